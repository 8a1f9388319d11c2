"""Compare fine-tuning methods (gem_ds/comparison/main.py)."""

import sys

from gem_ds.comparison.main import run_as_program

if __name__ == "__main__":
    sys.exit(run_as_program())
