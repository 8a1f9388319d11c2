"""Answers that are written: SQuAD, STS-B (gem_ds/evaluate/squad.py)."""

import sys

from gem_ds.cli import run

if __name__ == "__main__":
    sys.exit(run("eval squad"))
