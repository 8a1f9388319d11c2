"""What the programs' ``--help`` has in common: how they are called, and how defaults are told."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def name_of(program: str) -> str:
    """How the user started a program of :mod:`gem_ds.cli`, for its usage line.

    ``gem-ds eval gsm8k``, ``launch/train.py`` or ``python -m eval.gsm8k``.
    """
    if (spec := sys.modules["__main__"].__spec__) is not None:
        module = spec.name.removesuffix(".__main__")
        return f"python -m {module}{f' {program}' if module == 'gem_ds.cli' else ''}"
    return f"gem-ds {program}" if Path(sys.argv[0]).stem == "gem-ds" else sys.argv[0]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default, unless it is None or the flag's own words tell it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)
