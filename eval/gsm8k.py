"""Exact match on GSM8K (gem_ds/evaluate/gsm8k.py)."""

from gem_ds.cli import run

if __name__ == "__main__":
    raise SystemExit(run("eval gsm8k"))
