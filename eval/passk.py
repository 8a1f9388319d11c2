"""pass@k on programs, in a sandbox (gem_ds/evaluate/passk.py)."""

from gem_ds.cli import run

if __name__ == "__main__":
    raise SystemExit(run("eval passk"))
