"""What the measurements share: contenders, their processes, turns, memory, traffic, tables."""

from __future__ import annotations

import argparse


def flags_of(program: str, about: str | None) -> argparse.ArgumentParser:
    """A parser for the flags of a program of this folder, whose text is told as it is written."""
    name, form = f"benchmarks/{program}.py", argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=name, description=about, formatter_class=form)
