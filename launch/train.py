"""Fine-tune a language model with GEM: what `deepspeed` runs (gem_ds/train/main.py)."""

import sys

from gem_ds.train.main import run_as_program

if __name__ == "__main__":
    sys.exit(run_as_program())
