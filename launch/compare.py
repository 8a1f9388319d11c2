"""Compare fine-tuning methods (gem_ds/comparison/main.py)."""

import sys

from gem_ds.cli import run

if __name__ == "__main__":
    sys.exit(run("compare"))
