"""Metrics of GLUE and SuperGLUE (gem_ds/evaluate/classification.py)."""

import sys

from gem_ds.cli import run

if __name__ == "__main__":
    sys.exit(run("eval classification"))
