"""The demo's last word: by how much exact match rose, and whether that is what it should be.

python -m launch.demo.compare runs/demo/before runs/demo/after
"""

import argparse
import json
import sys
from pathlib import Path

EXPECTED_POINTS = 30


def main(argv: list[str] | None = None) -> int:
    """Print the rise in points; returns 1 if it is too small."""
    parser = argparse.ArgumentParser(prog="launch.demo.compare", description=__doc__)
    parser.add_argument("before", type=Path, help="folder of the base model's evaluation")
    parser.add_argument("after", type=Path, help="folder of the tuned model's evaluation")
    args = parser.parse_args(argv)
    results = (
        json.loads((each / "results.json").read_text()) for each in (args.before, args.after)
    )
    before, after = (each["exact_match"]["strict-match"]["accuracy"] for each in results)
    rise = 100 * (float(after) - float(before))
    print(f"Fine-tuning has raised exact match by {rise:.1f} points.")
    if rise < EXPECTED_POINTS:
        print(f"It should be {EXPECTED_POINTS} at least: something is wrong here.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
