"""The numbers of a comparison: a line per run, the rates chosen by them, a line per method.

They are pandas' frames of Python's own values, so that a count stays whole beside one that failed.
A cell that has not come to its end has no score, but NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from statistics import fmean, stdev

import pandas as pd

from gem_ds.comparison.bootstrap import Findings, interval_over_seeds, is_loss
from gem_ds.comparison.cells import Cell, folder_of
from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.results import COSTS, LOSS, read_result

#: The rate chosen by task and method; None where every run of the search has failed.
Rates = Mapping[tuple[str, str], float | None]

#: The columns of a table of runs, and those that cells.csv lacks.
COLUMNS = (
    *("task", "method", "learning_rate", "seed", "split", "status", "metric", "score", "loss"),
    *(*COSTS, "folder", "cell", "aim_name", "aim"),
)
NOT_WRITTEN = ["cell", "aim_name", "aim"]


def tabulate_cells(comparison: Comparison, cells: Iterable[Cell]) -> pd.DataFrame:
    """A line per run: the columns of cells.csv, and `NOT_WRITTEN`.

    By ``aim`` learning rates are chosen: it is the score, or the loss, as ``aim_name`` says.
    """
    records = []
    for cell in cells:
        folder = folder_of(comparison, cell).relative_to(comparison.output_dir)
        record = {"status": "failed", "metric": "", "folder": str(folder), "cell": cell}
        with suppress(ValueError):
            result = read_result(comparison, cell)
            aims = (LOSS, "loss") if comparison.choose_by == "loss" else (result["metric"], "score")
            record |= {"status": "finished", "aim_name": aims[0], "aim": result[aims[1]]} | result
        records.append(vars(cell) | record)
    return pd.DataFrame(records, columns=list(COLUMNS), dtype=object)


def finished(cells: pd.DataFrame, task: str, split: str, method: str | None = None) -> pd.DataFrame:
    """The lines of the runs of a task, and of one method alone, that have come to their end."""
    chosen = (cells.task == task) & (cells.split == split) & cells.score.notna()
    return cells[chosen if method is None else chosen & (cells.method == method)]


def choose_rates(comparison: Comparison, cells: pd.DataFrame) -> Rates:
    """The learning rate of every task and method, from the finished runs of the search."""
    rates: dict[tuple[str, str], float | None] = {}
    for task in comparison.tasks:
        for name, method in comparison.methods.items():
            own = method.learning_rates
            found = finished(cells, task, "dev", name)
            rates[task, name] = own[0] if len(own) == 1 else best_rate(found)
    return rates


def best_rate(tried: pd.DataFrame) -> float | None:
    """That of the best aim; of equal ones, as before anything is learnt, of the least loss."""
    badness = tried.aim if any(map(is_loss, tried.aim_name)) else -tried.aim
    return min(zip(badness, tried.loss, tried.learning_rate, strict=True), default=(None,))[-1]


def tabulate(
    comparison: Comparison, cells: pd.DataFrame, rates: Rates, findings: Mapping[str, Findings]
) -> pd.DataFrame:
    """A line per task and method, in the order of the file: the columns of table.csv."""
    records = []
    for (task, method), rate in rates.items():
        grid = comparison.methods[method].learning_rates
        tried, runs = (finished(cells, task, split, method) for split in ("dev", "test"))
        record = {"task": task, "method": method, "metric": next(iter(runs.metric), "")}
        record |= zip(("mean", "std"), mean_and_std(runs.score), strict=True)
        if comparison.choose_by == "loss":
            loss, std = interval_over_seeds(runs.loss), mean_and_std(runs.loss)[1]
            score = findings[task].scores.get(method, interval_over_seeds([]))
            record |= {"low": score.low, "high": score.high, "loss": loss.value, "loss_std": std}
            record |= {"loss_low": loss.low, "loss_high": loss.high}
        record |= {
            "num_seeds": len(runs),
            "num_failed": len(comparison.seeds) - len(runs),
            "learning_rate": rate,
            "is_at_edge": len(grid) > 1 and rate in (grid[0], grid[-1]),
            "dev_metric": next(iter(tried.aim_name), None),
            "dev_score": tried.set_index("learning_rate").aim.get(rate),
        }
        costs = {name: mean_and_std(runs[name])[0] for name in COSTS}
        costs["peak_memory_bytes"] = max(runs.peak_memory_bytes, default=math.nan)
        records.append(record | costs)
    return pd.DataFrame(records, dtype=object)


def mean_and_std(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN where there are too few values."""
    values = list(values)
    mean = fmean(values) if values else math.nan
    return mean, stdev(values) if len(values) > 1 else math.nan


def table_csv(table: pd.DataFrame) -> str:
    """The text of table.csv; what is not a number stays empty."""
    counts = [name for name in COSTS if name.startswith("num_")]
    whole = (table[counts].astype(float) // 1).astype("Int64")
    return str(table.assign(**whole).to_csv(index=False, lineterminator="\n"))


def cells_csv(comparison: Comparison, cells: pd.DataFrame) -> str:
    """The text of cells.csv."""
    left_out = NOT_WRITTEN if comparison.choose_by == "loss" else [*NOT_WRITTEN, "loss"]
    return str(cells.drop(columns=left_out).to_csv(index=False, lineterminator="\n"))
