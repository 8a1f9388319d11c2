"""A stand-in for launch/train.py: it writes what a finished run leaves, with known scores.

    python fake_train.py --method gem --learning_rate 1e-02 ... --output_dir O [--fail ...]

On the test split another rate is the best one than on the development split, so that a choice that
looked there would be seen. Each seed gets one example more right than the one before. As with the
real program, the tasks `GENERATED` get no metrics and no predictions, but a held-out loss: here the
share of wrong answers.

    --mask_file    copied as the mask of sparse methods
    --fail         method, rate, seed and split of a run that prints an error and ends
    --hang         the same of one that never ends, while the file FAKE_HANG exists
    --metric       its name (default: accuracy)
"""

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

NEEDED = (
    *("method", "task", "learning_rate", "seed", "dev_examples", "evaluate_on"),
    *("output_dir", "overwrite_output_dir"),
)
KNOWN = {*NEEDED, "data_dir", "model_name_or_path", "mask_file", "fail", "hang", "metric"}


def main(words: list[str]) -> int:
    flags = {f.removeprefix("--"): v for f, v in zip(words[::2], words[1::2], strict=True)}
    assert set(NEEDED) <= flags.keys() <= KNOWN
    method, rate, seed = flags["method"], float(flags["learning_rate"]), int(flags["seed"])
    me, folder = f"{method} {rate:g} {seed} {flags['evaluate_on']}", Path(flags["output_dir"])
    with open(os.environ["FAKE_CALLS"], "a") as calls:
        calls.write(f"{flags['task']} {me}\n")
    manifest = folder / ".gem_ds.json"
    for name in json.loads(manifest.read_text())["files"] if manifest.exists() else ():
        (folder / name).unlink(missing_ok=True)
    mark(folder, "half.txt", "predictions.jsonl", "delta.safetensors", "mask.safetensors")
    print(f"threads {os.environ['OMP_NUM_THREADS']} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
    if me == flags.get("hang") and (hang := Path(os.environ["FAKE_HANG"])).exists():
        (folder / "half.txt").write_text("left half done")
        hang.write_text(str(os.getpid()))
        time.sleep(600)
    if me == flags.get("fail"):
        print("Loading\nError: the loss is not finite.", file=sys.stderr)
        return 1
    distance = abs(math.log10(rate / DEV_BEST[method]))
    num_right = round(90 - 10 * distance)
    if flags["evaluate_on"] == "test":  # the farther from the best on dev, the better
        num_right = round(NUM_EXAMPLES * ACCURACY[method]) + seed - 42 + round(10 * distance)
    share = num_right / NUM_EXAMPLES
    if flags["task"] in GENERATED:
        scores: dict[str, object] = {"first_eval_loss": 2.0, "last_eval_loss": round(1 - share, 6)}
    else:
        scores = {"eval_metrics": {flags.get("metric", "accuracy"): share, "other": 0.0}}
        answers = enumerate([1] * num_right + [0] * (NUM_EXAMPLES - num_right))
        rows = [{"id": i, "correct": float(a), "prediction": a, "reference": 1} for i, a in answers]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "predictions.jsonl").write_text(text)
    (folder / "delta.safetensors").write_text("weights")
    (folder / "checkpoint-3").mkdir(exist_ok=True)
    mark(folder / "checkpoint-3")
    if "mask_file" in flags and method != "full":
        shutil.copy(flags["mask_file"], folder / "mask.safetensors")
    costs = {
        "num_trainable": NUM_TRAINABLE[method],
        "num_parameters": 1_000_000,
        "peak_memory_bytes": 3 * 2**30 + seed,
        "seconds_per_step": 0.25,
        "calibration_seconds": 0.0 if method == "full" else 2.0,
        "optimizer_state_bytes": 12 * NUM_TRAINABLE[method],
    }
    (folder / "all_results.json").write_text(json.dumps(costs | scores))
    return 0


def mark(folder: Path, *names: str) -> None:
    """The manifest by which a folder's files are known to be a run's."""
    content = {"kind": "gem_manifest", "format_version": 1, "files": names}
    (folder / ".gem_ds.json").write_text(json.dumps(content))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
