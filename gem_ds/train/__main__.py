"""What `deepspeed --module gem_ds.train` runs."""

import sys

from gem_ds.cli import run

if __name__ == "__main__":
    sys.exit(run("train"))
