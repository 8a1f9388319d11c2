"""The finished runs of a comparison, found by their folders: it may still be at work."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from gem_ds.comparison.results import RESULTS_FILE, Result, read_training
from gem_ds.train.methods import METHODS


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """One cell that has come to its end."""

    task: str
    method: str
    learning_rate: float
    seed: int
    split: str  # dev or test
    folder: Path
    result: Result


def finished_runs(root: Path) -> list[FinishedRun]:
    """Those below a comparison's folder, by task, in the order of the table of methods."""
    found = []
    for path in root.glob(f"*/*/*/lr*_seed*/{RESULTS_FILE}"):
        task, method, split, name = path.parent.relative_to(root).parts
        parts = re.fullmatch(r"lr(.+)_seed(\d+)", name)
        if parts is None:
            continue
        with suppress(ValueError):  # it is not whole
            run = FinishedRun(
                task=task,
                method=method,
                learning_rate=float(parts[1]),
                seed=int(parts[2]),
                split=split,
                folder=path.parent,
                result=read_training(path.parent),
            )
            found.append(run)
    return sorted(found, key=_place)


def by_task(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Sorted runs by their task."""
    return {task: list(own) for task, own in groupby(runs, key=lambda run: run.task)}


def by_method(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Sorted runs of one task by their method."""
    return {method: list(own) for method, own in groupby(runs, key=lambda run: run.method)}


def place_of_method(name: str) -> tuple[int, str]:
    """Where a row is: the methods in the order of their table, then rows of other names."""
    return METHODS.index(name) if name in METHODS else len(METHODS), name


def _place(run: FinishedRun) -> tuple[str, tuple[int, str], float, int]:
    return run.task, place_of_method(run.method), run.learning_rate, run.seed
