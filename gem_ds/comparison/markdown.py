"""The tables of a comparison for reading, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import pandas as pd

from gem_ds.comparison.bootstrap import Findings, Interval, is_loss
from gem_ds.comparison.cells import Cell, folder_of, rate_text
from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.results import LOSS
from gem_ds.comparison.table import finished, mean_and_std

_INTERVAL = "95 % interval"


def markdown(
    comparison: Comparison,
    table: pd.DataFrame,
    cells: pd.DataFrame,
    findings: Mapping[str, Findings],
    failures: Mapping[Cell, str],
) -> str:
    """The text of table.md."""
    seeds = ", ".join(map(str, comparison.seeds))
    best = "has the least loss" if comparison.choose_by == "loss" else "is the best"
    own = {name: task.dev_examples for name, task in comparison.tasks.items() if task.dev_examples}
    held_out = "; ".join([f"{comparison.dev_examples:,}", *(f"{n}: {own[n]:,}" for n in own)])
    parts = [
        "# Comparison",
        f"Scores on the test split: mean and standard deviation over the seeds {seeds}. Of several "
        f"learning rates each {best}, with the first seed, on examples that were held out of "
        f"the training data ({held_out}). Optimizer state (the first process's masters and "
        "moments), time and calibration: means over the seeds, the latter two in seconds; peak "
        "memory: the largest.",
    ]
    for task in comparison.tasks:
        rows = table[table.task == task]
        parts += _score_section(task, rows) + _difference_section(findings[task], rows)
        parts += _rate_section(comparison, rows, cells)
    parts += _average_section(table, cells)
    lines = [f"* {cell}: {why} (`{folder_of(comparison, cell)}`)" for cell, why in failures.items()]
    parts += ["## Failed runs", "\n".join(lines)] if lines else []
    return "\n\n".join(parts) + "\n"


class Unit:
    """How a metric is written: per cent, a correlation, or a loss."""

    def __init__(self, metric: str) -> None:
        self.is_loss = is_loss(metric)
        is_correlation = metric in ("matthews_correlation", "pearson")  # in [-1, 1]: no percentage
        self.is_share = not (self.is_loss or is_correlation)
        self.factor = 100 if self.is_share else 1
        self.decimals = 1 if self.is_share else 3
        name = metric.replace("_", " ")
        self.label = f"{name} (%)" if self.is_share else name

    def write(self, value: float, *, sign: bool = False) -> str:
        """A score, or with its sign a difference."""
        text = f"{value * self.factor:z.{self.decimals}f}"  # z: never -0.0
        return f"+{text}" if sign and float(text) > 0 else text

    def write_range(self, low: float, high: float, *, sign: bool = False) -> str:
        """An interval, if there is one."""
        ends = self.write(low, sign=sign), self.write(high, sign=sign)
        return "" if math.isnan(low) else " to ".join(ends)

    def write_spread(self, mean: float, std: float) -> str:
        """Mean and standard deviation, if there is one."""
        return self.write(mean) + ("" if math.isnan(std) else f" ± {self.write(std)}")


def unit_of(metrics: Iterable[str | None]) -> Unit:
    """That of several methods on one task, the first that is known."""
    return Unit(next(filter(None, metrics), "score"))


def byte_text(count: float) -> str:
    """A size for reading."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _score_section(task: str, rows: pd.DataFrame) -> list[str]:
    unit, loss, with_losses = unit_of(rows.metric), Unit(LOSS), "loss" in rows
    scores = [unit.label, *([_INTERVAL, loss.label, _INTERVAL] if with_losses else [])]
    costs = ("trained", "of all", "optimizer state", "peak memory", "s per step", "calibration s")
    lines = []
    for row in rows.itertuples():
        rate = "" if row.learning_rate is None else rate_text(row.learning_rate)
        if not row.num_seeds:
            lines.append([row.method, "failed", *[""] * (len(scores) - 1), rate])
            continue
        num_seeds = row.num_seeds + row.num_failed
        failed = f" ({row.num_failed} of {num_seeds} seeds failed)" if row.num_failed else ""
        line = [row.method, unit.write_spread(row.mean, row.std) + failed]
        if with_losses:
            line.append(unit.write_range(row.low, row.high))
            line.append(loss.write_spread(row.loss, row.loss_std))
            line.append(loss.write_range(row.loss_low, row.loss_high))
        line += [rate + (" ⚠" if row.is_at_edge else ""), f"{row.num_trainable:,.0f}"]
        line += [_percent(row.num_trainable / row.num_parameters)]
        line += [byte_text(row.optimizer_state_bytes), byte_text(row.peak_memory_bytes)]
        line += [f"{row.seconds_per_step:.3g}", f"{row.calibration_seconds:.1f}"]
        lines.append(line)
    parts = [f"## {task}", _table(["method", *scores, "learning rate", *costs], lines)]
    if edges := list(rows.method[rows.is_at_edge.astype(bool)]):
        parts.append(
            f"⚠ The learning rate of {', '.join(edges)} lies at the edge of its grid: a rate "
            "beyond may be better, so widen the grid."
        )
    if with_losses:
        parts.append(
            "Intervals of losses are Student's over the seeds, of differences paired by seed; "
            "those of scores are of the bootstrap over the test examples and the seeds."
        )
    return parts


def _difference_section(found: Findings, rows: pd.DataFrame) -> list[str]:
    if sum(rows.num_seeds > 0) < 2:
        return []
    unit, parts = unit_of(rows.metric), [f"### Difference from {found.reference}"]
    if found.differences:
        points = "difference (points)" if unit.is_share else "difference"
        parts.append(_interval_table(points, unit, found.differences))
        parts.append(
            "Paired bootstrap over the test examples and the seeds; *real* where the interval "
            "excludes 0. Few seeds make it too narrow, and one says nothing of others. Intervals "
            "are not corrected for the number of comparisons."
        )
    parts += [found.note] if found.note else []
    if found.losses:
        parts.append(_interval_table("difference of the loss", Unit(LOSS), found.losses))
    return parts


def _interval_table(title: str, unit: Unit, found: Mapping[str, Interval]) -> str:
    lines = []
    for method, each in found.items():
        reach = unit.write_range(each.low, each.high, sign=True)
        verdict = "real" if each.is_real else ""
        lines.append((method, unit.write(each.value, sign=True), reach, verdict))
    return _table(("method", title, _INTERVAL, ""), lines)


def _rate_section(comparison: Comparison, rows: pd.DataFrame, cells: pd.DataFrame) -> list[str]:
    lines: list[Sequence[str]] = []
    unit = unit_of(rows.dev_metric)
    for row in rows.itertuples():
        grid = comparison.methods[row.method].learning_rates
        tried = finished(cells, row.task, "dev", row.method)
        scores = dict(zip(tried.learning_rate, tried.aim, strict=True))
        line = [row.method]
        for rate in grid if len(grid) > 1 else ():
            text = f"{rate_text(rate)}: {unit.write(scores[rate]) if rate in scores else 'failed'}"
            line.append(f"**{text}**" if rate == row.learning_rate else text)
        lines += [line] if len(line) > 1 else []
    title = f"### Learning rates: {unit.label} on the development split"
    return [title, _table(["method"], lines)] if lines else []


def _average_section(table: pd.DataFrame, cells: pd.DataFrame) -> list[str]:
    """Mean and deviation over the seeds of the mean over the tasks, where that means something."""
    if table.task.nunique() < 2 or any(map(is_loss, table.metric)):
        return []
    lines = []
    for method, own in table.groupby("method", sort=False):
        runs = cells[(cells.method == method) & (cells.split == "test")]
        means = (fmean(scores) for _, scores in runs.groupby("seed", sort=False).score)
        failed = own.num_failed.any()  # somewhere
        score = "failed" if failed else Unit("average").write_spread(*mean_and_std(means))
        share = list((own.num_trainable / own.num_parameters)[own.num_seeds > 0])
        lines.append((str(method), score, _percent(fmean(share)) if share else ""))
    header = ("method", "score (points of 100)", "trained, of all")
    return ["## Average over the tasks", _table(header, lines)]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Of lines whose last fields may be left out."""
    width = max(map(len, (header, *lines)))
    rule = ["---", *["---:"] * (width - 1)]
    rows = ([*line, *[""] * (width - len(line))] for line in (header, rule, *lines))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
