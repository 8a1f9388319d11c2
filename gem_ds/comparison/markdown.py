"""The tables of a comparison for reading, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import pandas as pd

from gem_ds.comparison.bootstrap import Findings, Interval
from gem_ds.comparison.cells import Cell, folder_of, rate_text
from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.metrics import Unit
from gem_ds.comparison.results import LOSS
from gem_ds.comparison.table import aim_of, averages, finished, mean_and_std

_INTERVAL = "95 % interval"

#: What a section says of intervals of losses, where learning rates are chosen by them.
_OF_LOSSES = (
    "Intervals of losses are Student's over the seeds, of differences paired by seed; those of "
    "scores are of the bootstrap over the test examples and the seeds."
)


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
    parts = [
        "# Comparison",
        f"Scores on the test split: mean and standard deviation over the seeds {seeds}. Of several "
        f"learning rates each {best}, with the first seed, on examples that were held out of "
        f"the training data ({_dev_text(comparison)}). Optimizer "
        "state (the first process's masters and moments), time and calibration: means over the "
        "seeds, the latter two in seconds; peak memory: the largest.",
    ]
    for task in comparison.tasks:
        own = table[table.task == task]
        parts += _score_section(task, own) + _difference_section(findings[task], own)
        parts += _rate_section(comparison, own, cells)
    parts += _average_section(averages(table, cells), table)
    if failures:
        lines = (
            f"* {cell}: {reason} (`{folder_of(comparison, cell)}`)"
            for cell, reason in failures.items()
        )
        parts += ["## Failed runs", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def unit_of(rows: pd.DataFrame) -> Unit:
    """That of a task, by its lines of the table."""
    return Unit(next(filter(None, rows.metric), "score"))


def byte_text(count: float) -> str:
    """A size for reading."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _dev_text(comparison: Comparison) -> str:
    """How many examples choose the learning rates: ``500; cb: 50``."""
    own = {name: task.dev_examples for name, task in comparison.tasks.items() if task.dev_examples}
    parts = [f"{comparison.dev_examples:,}", *(f"{name}: {own[name]:,}" for name in own)]
    return "; ".join(parts)


def _score_section(task: str, rows: pd.DataFrame) -> list[str]:
    unit, loss = unit_of(rows), Unit(LOSS)
    with_losses = "loss" in rows
    scores = [unit.label, *([_INTERVAL, loss.label, _INTERVAL] if with_losses else [])]
    costs = ("trained", "of all", "optimizer state", "peak memory", "s per step", "calibration s")
    lines = []
    for row in rows.itertuples():
        rate = "" if row.learning_rate is None else rate_text(row.learning_rate)
        if not row.num_seeds:
            blank = [""] * (len(scores) - 1)
            lines.append([row.method, "failed", *blank, rate, *[""] * len(costs)])
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
    return [*parts, _OF_LOSSES] if with_losses else parts


def _difference_section(found: Findings, rows: pd.DataFrame) -> list[str]:
    if sum(rows.num_seeds > 0) < 2:
        return []
    unit, parts = unit_of(rows), [f"### Difference from {found.reference}"]
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
    lines = [
        (
            method,
            unit.write(each.value, sign=True),
            unit.write_range(each.low, each.high, sign=True),
            "real" if each.is_real else "",
        )
        for method, each in found.items()
    ]
    return _table(("method", title, _INTERVAL, ""), lines)


def _rate_section(comparison: Comparison, rows: pd.DataFrame, cells: pd.DataFrame) -> list[str]:
    lines: list[list[str]] = []
    unit = Unit(next(filter(None, rows.dev_metric), "score"))
    for row in rows.itertuples():
        grid = comparison.methods[row.method].learning_rates
        scores = aim_of(comparison, finished(cells, row.task, "dev", row.method))[1]
        line = [row.method]
        for rate in grid if len(grid) > 1 else ():
            text = f"{rate_text(rate)}: {unit.write(scores[rate]) if rate in scores else 'failed'}"
            line.append(f"**{text}**" if rate == row.learning_rate else text)
        lines += [line] if len(line) > 1 else []
    if not lines:
        return []
    width = max(map(len, lines))
    lines = [line + [""] * (width - len(line)) for line in lines]
    title = f"### Learning rates: {unit.label} on the development split"
    return [title, _table(["method", *[""] * (width - 1)], lines)]


def _average_section(means: Mapping[str, Sequence[float]], table: pd.DataFrame) -> list[str]:
    if not means:
        return []
    unit, lines = Unit("average"), []
    for method, values in means.items():
        own = table[(table.method == method) & (table.num_seeds > 0)]
        share = list(own.num_trainable / own.num_parameters)
        score = unit.write_spread(*mean_and_std(values)) if values else "failed"
        lines.append((method, score, _percent(fmean(share)) if share else ""))
    header = ("method", "score (points of 100)", "trained, of all")
    return ["## Average over the tasks", _table(header, lines)]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))
