"""Fine-tune a language model with GEM: what `deepspeed` runs (gem_ds/train/main.py)."""

import sys

from gem_ds.cli import run

if __name__ == "__main__":
    sys.exit(run("train"))
