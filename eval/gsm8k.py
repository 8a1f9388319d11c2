"""Exact match on GSM8K (gem_ds/evaluate/gsm8k.py)."""

import sys

from gem_ds.cli import run

if __name__ == "__main__":
    sys.exit(run("eval gsm8k"))
