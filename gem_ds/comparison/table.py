"""The numbers of a comparison: a row per task and method, and the differences between methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev

from gem_ds.comparison.bootstrap import (
    Difference,
    Scores,
    difference,
    refuse_other_examples,
    resample_scores,
)
from gem_ds.comparison.cells import Cell, final_cells
from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.metrics import is_loss
from gem_ds.comparison.rates import Choice
from gem_ds.comparison.results import Result, read_predictions, read_result

#: The method that the others are measured against, where it takes part; else it is the first.
REFERENCE = "gem"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method on a task, over all seeds.

    Attributes:
        results: of the runs that came to their end, one per seed.
        num_failed: seeds whose run did not.
        choice: the learning rate and how it was found.
    """

    task: str
    method: str
    choice: Choice
    results: Mapping[Cell, Result]
    num_failed: int

    @property
    def metric(self) -> str:
        """Name of the task's main metric; empty where no run came to its end."""
        return next((result.metric for result in self.results.values()), "")

    @property
    def scores(self) -> list[float]:
        """By seed."""
        return [result.score for result in self.results.values()]

    @property
    def peak_memory_bytes(self) -> float:
        """The largest of all seeds."""
        return max(self.costs("peak_memory_bytes"))

    def cost(self, name: str) -> float:
        """The mean of a cost over the seeds."""
        return fmean(self.costs(name))

    def costs(self, name: str) -> list[float]:
        """A cost by seed."""
        return [result.costs[name] for result in self.results.values()]


@dataclass(frozen=True, kw_only=True)
class Differences:
    """What the paired bootstrap says of a task.

    Attributes:
        reference: the method that the others are measured against.
        by_method: of the others.
        note: what a reader must know of them; empty if nothing.
    """

    reference: str
    by_method: Mapping[str, Difference]
    note: str = ""


def tabulate(comparison: Comparison, choices: Mapping[tuple[str, str], Choice]) -> list[Row]:
    """The rows, in the order of the file."""
    results: dict[Cell, Result] = {}
    for cell in final_cells(comparison, {key: choice.rate for key, choice in choices.items()}):
        try:
            results[cell] = read_result(comparison, cell)
        except ValueError:
            continue
    rows = []
    for (task, method), choice in choices.items():
        own = {c: r for c, r in results.items() if (c.task, c.method) == (task, method)}
        rows.append(
            Row(
                task=task,
                method=method,
                choice=choice,
                results=own,
                num_failed=len(comparison.seeds) - len(own),
            )
        )
    return rows


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which is NaN of a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else math.nan


def averages(rows: Sequence[Row], num_tasks: int) -> dict[str, list[float]]:
    """By method, for each seed the mean over the tasks.

    Empty for a method that failed somewhere, and without any method where a task's metric is a loss
    or there is one task only.
    """
    if num_tasks < 2 or any(is_loss(row.metric) for row in rows):
        return {}
    means = {}
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        complete = not any(row.num_failed for row in own)
        means[method] = (
            [fmean(scores) for scores in zip(*(row.scores for row in own), strict=True)]
            if complete
            else []
        )
    return means


def compare_methods(comparison: Comparison, rows: Sequence[Row]) -> Differences | None:
    """The paired bootstrap on one task, over the seeds that both sides have.

    None where there is nothing to compare.

    Args:
        comparison: the file.
        rows: of one task.
    """
    rows = [row for row in rows if row.results]
    names = [row.method for row in rows]
    if len(rows) < 2:
        return None
    reference = REFERENCE if REFERENCE in names else names[0]
    metric = rows[0].metric
    try:
        if any(row.metric != metric for row in rows) or is_loss(metric):
            raise ValueError("the bootstrap needs one metric, which is no loss.")
        runs = {
            row.method: {cell.seed: read_predictions(comparison, cell) for cell in row.results}
            for row in rows
        }
        refuse_other_examples([run for by_seed in runs.values() for run in by_seed.values()])

        @cache
        def scores(method: str, seeds: tuple[int, ...]) -> Scores:
            return resample_scores([runs[method][seed] for seed in seeds], metric)

        shared = {
            name: tuple(seed for seed in runs[reference] if seed in runs[name]) for name in names
        }
        by_method = {
            name: difference(scores(name, seeds), scores(reference, seeds))
            for name, seeds in shared.items()
            if seeds and name != reference
        }
        strays = any(
            abs(scores(row.method, tuple(runs[row.method])).value - fmean(row.scores)) > 1e-4
            for row in rows
        )
    except ValueError as error:
        return Differences(reference=reference, by_method={}, note=f"Not computed: {error}")
    note = "Of the share of right answers, which is not the metric above." if strays else ""
    return Differences(reference=reference, by_method=by_method, note=note)
