"""Write a Hugging Face folder from a base model and a delta (gem_ds/formats/export.py)."""

import sys

from gem_ds.cli import run

if __name__ == "__main__":
    sys.exit(run("export"))
