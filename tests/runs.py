"""What runs leave, read back."""

import json
from pathlib import Path
from typing import Any

import torch

from gem_ds.files.delta import Delta


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def logged(folder: Path, key: str) -> list[tuple[int, float]]:
    """The steps whose entry in the log has a number of that name, and the number."""
    return [(row["step"], row[key]) for row in rows_of(folder / "metrics.jsonl") if key in row]


def delta_of(folder: Path) -> Delta:
    """The product of a run."""
    return Delta.load(folder / "delta.safetensors")


def assert_same_delta(folder: Path, other: Path, **tolerance: float) -> None:
    """The deltas of two runs: values and heads to the bit, unless a tolerance is given."""
    found, expected = delta_of(folder), delta_of(other)
    for name, index in expected.mask.indices.items():
        assert torch.equal(found.mask.indices[name], index), name
    for part in ("values", "head"):
        assert getattr(found, part).keys() == getattr(expected, part).keys()
        for name, values in getattr(expected, part).items():
            given = {"rtol": 0.0, "atol": 0.0} | tolerance
            torch.testing.assert_close(getattr(found, part)[name], values, **given)
