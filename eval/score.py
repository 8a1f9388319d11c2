"""Score samples again, without a model (gem_ds/evaluate/score.py)."""

import sys

from gem_ds.cli import run

if __name__ == "__main__":
    sys.exit(run("eval score"))
