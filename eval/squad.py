"""Answers that are written: SQuAD, STS-B (gem_ds/evaluate/squad.py)."""

from gem_ds.cli import run

if __name__ == "__main__":
    raise SystemExit(run("eval squad"))
