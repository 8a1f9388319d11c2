"""How many samples change with the batch size, by dtype: what the rounding of padded rows can do.

    python benchmarks/sampling_batches.py --model_name_or_path launch/demo/model \
        --data_dir launch/demo/task --output_dir runs/batches

Each problem is sampled greedily and at temperature 0.8, in batches of 1, 4 and 32; what differs
from batches of 1 is counted, and the time taken. Noise is the same in all (`evaluate.generation`).
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from gem_ds.evaluate import gsm8k
from gem_ds.evaluate.generation import GenerationSettings
from gem_ds.evaluate.model import SamplingArguments
from gem_ds.evaluate.sampling import sample_all

BATCH_SIZES = (1, 4, 32)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="benchmarks/sampling_batches.py", description=__doc__)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--data_dir", help="folder of GSM8K's files (default: from the Hub)")
    parser.add_argument("--output_dir", required=True, help="is overwritten")
    parser.add_argument("--limit", type=int, default=200, help="problems")
    parser.add_argument("--max_new_tokens", type=int, default=48)
    args = parser.parse_args(argv)

    prompts = gsm8k.prompts_of(gsm8k.load(args.data_dir, args.limit), 0)
    print("dtype      temperature  batch size  seconds  samples that differ from batches of 1")
    for dtype in ("float32", "bfloat16"):
        for temperature in (0.0, 0.8):
            settings = GenerationSettings(
                max_new_tokens=args.max_new_tokens,
                stop_strings=gsm8k.STOP_STRINGS,
                temperature=temperature,
            )
            alone: list[str] = []
            for batch_size in BATCH_SIZES:
                folder = Path(args.output_dir) / f"{dtype}-{temperature}-{batch_size}"
                shutil.rmtree(folder, ignore_errors=True)
                started = time.perf_counter()
                samples = sample_all(
                    SamplingArguments(
                        model_name_or_path=args.model_name_or_path,
                        output_dir=str(folder),
                        batch_size=batch_size,
                        dtype=dtype,
                        disable_tqdm=True,
                    ),
                    prompts,
                    settings,
                )
                seconds = time.perf_counter() - started
                assert samples is not None, "one process"
                texts = [sample.completion for sample in samples]
                alone = alone or texts
                differ = sum(one != other for one, other in zip(alone, texts, strict=True))
                print(
                    f"{dtype:10} {temperature:11} {batch_size:11} {seconds:8.1f} "
                    f"{differ:5} of {len(texts)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
