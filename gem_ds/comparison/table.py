"""The numbers of a comparison: a line per run, the rates chosen by them, a line per method.

They are pandas' frames of Python's own values, so that a count stays whole beside one that failed.
A cell that has not come to its end has no score, which is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from statistics import fmean, stdev

import pandas as pd

from gem_ds.comparison.bootstrap import Findings, Interval, interval_over_seeds
from gem_ds.comparison.cells import Cell, folder_of
from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.metrics import is_loss
from gem_ds.comparison.results import COSTS, LOSS, read_result

#: The rate chosen by task and method; None where every run of the search has failed.
Rates = Mapping[tuple[str, str], float | None]

#: The columns of a table of runs.
COLUMNS = (
    *("task", "method", "learning_rate", "seed", "split", "status", "metric", "score", "loss"),
    *(*COSTS, "folder", "cell"),
)


def tabulate_cells(comparison: Comparison, cells: Iterable[Cell]) -> pd.DataFrame:
    """A line per run: the columns of cells.csv, ``loss``, and ``cell`` itself."""
    records = []
    for cell in cells:
        folder = folder_of(comparison, cell).relative_to(comparison.output_dir)
        record = vars(cell) | {
            "status": "failed",
            "metric": "",
            "folder": str(folder),
            "cell": cell,
        }
        with suppress(ValueError):
            result = read_result(comparison, cell)
            record |= {"status": "finished", **vars(result), **result.costs}
        records.append(record)
    return pd.DataFrame(records, columns=list(COLUMNS), dtype=object)


def finished(cells: pd.DataFrame, task: str, split: str, method: str | None = None) -> pd.DataFrame:
    """The lines of the runs of a task, and of one method alone, that have come to their end."""
    chosen = (cells.task == task) & (cells.split == split) & cells.score.notna()
    return cells[chosen if method is None else chosen & (cells.method == method)]


def aim_of(comparison: Comparison, tried: pd.DataFrame) -> tuple[str, pd.Series]:
    """By what the rates of these runs are judged: its name, and its value by rate."""
    by_rate = tried.set_index("learning_rate")
    if comparison.choose_by == "loss" and len(tried):
        return LOSS, by_rate.loss
    return next(iter(tried.metric), ""), by_rate.score


def choose_rates(comparison: Comparison, cells: pd.DataFrame) -> Rates:
    """The learning rate of every task and method, from the finished runs of the search."""
    rates: dict[tuple[str, str], float | None] = {}
    for task in comparison.tasks:
        for name, method in comparison.methods.items():
            own = method.learning_rates
            found = finished(cells, task, "dev", name)
            rates[task, name] = own[0] if len(own) == 1 else best_rate(comparison, found)
    return rates


def best_rate(comparison: Comparison, tried: pd.DataFrame) -> float | None:
    """The rate of the best score; of equal ones that of the least loss, then the smallest.

    A score such as the share of right answers is often the same to the last digit where nothing has
    been learnt yet, and the loss is not. None where nothing has been tried.
    """
    metric, values = aim_of(comparison, tried)
    badness = values if is_loss(metric) else -values
    return min(zip(badness, tried.loss, tried.learning_rate, strict=True), default=(None,))[-1]


def tabulate(
    comparison: Comparison, cells: pd.DataFrame, rates: Rates, findings: Mapping[str, Findings]
) -> pd.DataFrame:
    """A line per task and method, in the order of the file: the columns of table.csv."""
    records = []
    for (task, method), rate in rates.items():
        grid = comparison.methods[method].learning_rates
        tried, runs = (finished(cells, task, split, method) for split in ("dev", "test"))
        metric, values = aim_of(comparison, tried)
        mean, std = mean_and_std(runs.score)
        record = {"task": task, "method": method, "metric": next(iter(runs.metric), "")}
        record |= {"mean": mean, "std": std}
        if comparison.choose_by == "loss":
            record |= _intervals(findings[task].scores.get(method), runs.loss)
        record |= {
            "num_seeds": len(runs),
            "num_failed": len(comparison.seeds) - len(runs),
            "learning_rate": rate,
            "is_at_edge": len(grid) > 1 and rate in (grid[0], grid[-1]),
            "dev_metric": metric or None,
            "dev_score": values.get(rate),
        }
        costs = {name: mean_and_std(runs[name])[0] for name in COSTS}
        costs["peak_memory_bytes"] = max(runs.peak_memory_bytes, default=math.nan)
        records.append(record | costs)
    return pd.DataFrame(records, dtype=object)


def _intervals(score: Interval | None, losses: Sequence[float]) -> dict[str, float]:
    loss = interval_over_seeds(losses)
    return {
        "low": math.nan if score is None else score.low,
        "high": math.nan if score is None else score.high,
        "loss": loss.value,
        "loss_std": mean_and_std(losses)[1],
        "loss_low": loss.low,
        "loss_high": loss.high,
    }


def mean_and_std(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which is NaN of a single value; both of none."""
    values = list(values)
    mean = fmean(values) if values else math.nan
    return mean, stdev(values) if len(values) > 1 else math.nan


def averages(table: pd.DataFrame, cells: pd.DataFrame) -> dict[str, list[float]]:
    """By method, for each seed the mean over the tasks.

    Empty for a method that failed somewhere, and without any method where a task's metric is a loss
    or there is one task only.
    """
    if table.task.nunique() < 2 or any(map(is_loss, table.metric)):
        return {}
    means: dict[str, list[float]] = {}
    for method, own in table.groupby("method", sort=False):
        runs = cells[(cells.method == method) & (cells.split == "test")]
        is_whole = not own.num_failed.any()
        means[str(method)] = (
            [fmean(each) for _, each in runs.groupby("seed", sort=False).score] if is_whole else []
        )
    return means


def table_csv(table: pd.DataFrame) -> str:
    """The text of table.csv; what is not a number stays empty."""
    counts = [name for name in COSTS if name.startswith("num_")]
    whole = (table[counts].astype(float) // 1).astype("Int64")
    return str(table.assign(**whole).to_csv(index=False, lineterminator="\n"))


def cells_csv(comparison: Comparison, cells: pd.DataFrame) -> str:
    """The text of cells.csv."""
    left_out = ["cell"] if comparison.choose_by == "loss" else ["cell", "loss"]
    return str(cells.drop(columns=left_out).to_csv(index=False, lineterminator="\n"))
