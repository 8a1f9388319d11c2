"""Rows of the Hub, which read as lines of a file do: an error names data set, split and row."""

from __future__ import annotations

from pathlib import Path

from gem_ds.data.tasks.jsonl import Line


def read_hub(names: tuple[str, ...], split: str) -> list[Line]:
    """The rows of a split.

    Args:
        names: The data set's address and, where it has several, the configuration.
        split: For instance "train".
    """
    from datasets import load_dataset

    path = Path(*names, split)
    rows = load_dataset(*names)[split]
    return [Line(path, number, dict(row), "row") for number, row in enumerate(rows, start=1)]
