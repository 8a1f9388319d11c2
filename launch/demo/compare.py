"""A demo's last word: by how much its score rose, and whether that is what it should be.

python -m launch.demo.compare runs/demo/before runs/demo/after --points 30

The folders are those of two evaluations of the same examples. The score is the share that is right
(of GSM8K by strict-match), the interval of its rise a paired bootstrap's over the examples.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from gem_ds.comparison.bootstrap import interval, resample_scores
from gem_ds.comparison.results import Predictions
from gem_ds.data.predictions import PREDICTIONS_FILE
from gem_ds.evaluate.sampling import VERDICTS_FILE


def main(argv: list[str] | None = None) -> int:
    """Print the rise in points; returns 1 if it is too small."""
    parser = argparse.ArgumentParser(prog="launch.demo.compare", description=__doc__)
    parser.add_argument("before", type=Path, help="folder of the base model's evaluation")
    parser.add_argument("after", type=Path, help="folder of the tuned model's evaluation")
    parser.add_argument("--points", type=float, default=30, help="the least rise of a sound run")
    args = parser.parse_args(argv)
    before, after = (
        resample_scores([verdicts(folder)], "accuracy") for folder in (args.before, args.after)
    )
    rise = interval(100 * (after - before))
    print(
        f"Fine-tuning has raised the share of right answers by {rise.value:.1f} points (95 % "
        f"interval {rise.low:.1f} to {rise.high:.1f}), from {before[0]:.1%} to {after[0]:.1%}."
    )
    if rise.value < args.points:
        print(f"It should be {args.points:g} at least: something is wrong here.", file=sys.stderr)
        return 1
    return 0


def verdicts(folder: Path) -> Predictions:
    """What an evaluation says of each example."""
    path, field = folder / PREDICTIONS_FILE, "correct"
    if not path.exists():
        path, field = folder / VERDICTS_FILE, "strict_match"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    correct = np.array([line[field] for line in lines], dtype=np.float64)
    nothing = [None] * len(lines)
    return Predictions(ids=nothing, correct=correct, predictions=nothing, references=nothing)


if __name__ == "__main__":
    sys.exit(main())
