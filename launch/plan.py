"""Forecast the memory and messages of a training (gem_ds/planning/main.py)."""

import sys

from gem_ds.cli import run

if __name__ == "__main__":
    sys.exit(run("plan"))
