"""Metrics of GLUE and SuperGLUE (gem_ds/evaluate/classification.py)."""

from gem_ds.cli import run

if __name__ == "__main__":
    raise SystemExit(run("eval classification"))
