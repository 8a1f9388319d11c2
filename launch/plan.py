"""Forecast the memory and messages of a training (gem_ds/planning/main.py)."""

import sys

from gem_ds.planning.main import run_as_program

if __name__ == "__main__":
    sys.exit(run_as_program())
