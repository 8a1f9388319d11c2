"""What the programs' flags have in common: fields with a help, parsers, what ``--help`` tells."""

from __future__ import annotations

import argparse
import sys
from dataclasses import field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A field with a default and its help; `metadata` is argparse's, such as ``nargs``."""
    metadata["help"] = text
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def refuse_below_one(**counts: int | None) -> None:
    """Raise ValueError for counts, by the names of their flags, that are given and below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"--{name} must be at least 1, not {count}.")


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


def parser_of(program: str, description: str, *flags: type) -> HfArgumentParser:
    """The parser of a program of :mod:`gem_ds.cli` whose flags are the fields of dataclasses."""
    return HfArgumentParser(
        flags,  # type: ignore[arg-type]
        prog=name_of(program),
        description=description,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
