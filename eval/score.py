"""Score samples again, without a model (gem_ds/evaluate/score.py)."""

from gem_ds.cli import run

if __name__ == "__main__":
    raise SystemExit(run("eval score"))
