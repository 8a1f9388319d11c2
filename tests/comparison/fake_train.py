"""A stand-in for launch/train.py: it writes what a finished run leaves, with known scores.

    python fake_train.py --method gem --learning_rate 1e-02 ... --output_dir O [--fail ...]

On the development split the best rate of each method is `DEV_BEST`; on the test split it is another
one, so that a choice that looked there would be seen. Test accuracy is that of `ACCURACY`, in
`NUM_EXAMPLES` examples, and each seed gets one example more right than the one before. As with the
real program, the tasks `GENERATED` get no metrics and no predictions, but a held-out loss: here the
share of wrong answers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

NUM_EXAMPLES = 100
GENERATED = ("gsm8k", "mbpp")
DEV_BEST = {"gem": 1e-2, "full": 1e-3, "random": 1e-2}
ACCURACY = {"gem": 0.8, "full": 0.8, "random": 0.5}
NUM_TRAINABLE = {"gem": 1_000, "random": 1_000, "full": 1_000_000}


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("method", "task", "evaluate_on"):
        parser.add_argument(f"--{flag}", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--overwrite_output_dir", required=True, choices=["true"])
    parser.add_argument("--learning_rate", type=float, required=True)
    for flag in ("seed", "dev_examples"):
        parser.add_argument(f"--{flag}", type=int, required=True)
    parser.add_argument("--data_dir")
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--mask_file", help="copied as the mask of sparse methods")
    parser.add_argument("--fail", help="method at rate on split that prints an error and ends")
    parser.add_argument("--hang", help="the same for one that never ends, while HANG exists")
    parser.add_argument("--metric", default="accuracy")
    args = parser.parse_args()
    me = f"{args.method} {args.learning_rate:g} {args.seed} {args.evaluate_on}"
    with open(os.environ["FAKE_CALLS"], "a") as calls:
        calls.write(f"{args.task} {me}\n")
    print(f"threads {os.environ['OMP_NUM_THREADS']} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
    if me == args.hang and Path(os.environ["FAKE_HANG"]).exists():
        (args.output_dir / "half.txt").write_text("left half done")
        Path(os.environ["FAKE_HANG"]).write_text(str(os.getpid()))
        time.sleep(600)
    if me == args.fail:
        print("Loading\nError: the loss is not finite.", file=sys.stderr)
        return 1
    write_results(args)
    return 0


def write_results(args: argparse.Namespace) -> None:
    distance = abs(math.log10(args.learning_rate / DEV_BEST[args.method]))
    num_right = round(NUM_EXAMPLES * ACCURACY[args.method]) + args.seed - 42
    if args.evaluate_on == "dev":
        num_right = round(90 - 10 * distance)
    else:
        num_right += round(10 * distance)  # the farther from the best on dev, the better
    share = num_right / NUM_EXAMPLES
    if args.task in GENERATED:
        scores: dict[str, object] = {"first_eval_loss": 2.0, "last_eval_loss": round(1 - share, 6)}
    else:
        scores = {"eval_metrics": {args.metric: share, "other": 0.0}}
        write_predictions(args.output_dir / "predictions.jsonl", num_right)
    (args.output_dir / "delta.safetensors").write_text("weights")
    (args.output_dir / "checkpoint-3").mkdir()
    if args.mask_file and args.method != "full":
        shutil.copy(args.mask_file, args.output_dir / "mask.safetensors")
    results = {
        "num_trainable": NUM_TRAINABLE[args.method],
        "num_parameters": 1_000_000,
        "peak_memory_bytes": 3 * 2**30 + args.seed,
        "seconds_per_step": 0.25,
        "calibration_seconds": 0.0 if args.method == "full" else 2.0,
        "optimizer_state_bytes": 12 * NUM_TRAINABLE[args.method],
    }
    (args.output_dir / "all_results.json").write_text(json.dumps(results | scores))


def write_predictions(path: Path, num_right: int) -> None:
    rows = [
        {"id": i, "correct": float(i < num_right), "prediction": int(i < num_right), "reference": 1}
        for i in range(NUM_EXAMPLES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
