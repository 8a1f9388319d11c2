"""pass@k on programs, in a sandbox (gem_ds/evaluate/passk.py)."""

import sys

from gem_ds.cli import run

if __name__ == "__main__":
    sys.exit(run("eval passk"))
