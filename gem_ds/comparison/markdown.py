"""The tables of a comparison for reading, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from gem_ds.comparison.cells import Cell, folder_of, rate_text
from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.table import Differences, Row, averages
from gem_ds.comparison.unit import Unit, unit_of


def markdown(
    comparison: Comparison,
    rows: Sequence[Row],
    differences: Mapping[str, Differences | None],
    failures: Mapping[Cell, str],
) -> str:
    """The text of table.md."""
    seeds = ", ".join(map(str, comparison.seeds))
    parts = [
        "# Comparison",
        f"Scores on the test split: mean and standard deviation over the seeds {seeds}. Of several "
        "learning rates each is the best, with the first seed, on examples that were held out of "
        f"the training data ({_dev_text(comparison)}). Optimizer "
        "state (the first process's masters and moments), time and calibration: means over the "
        "seeds, the latter two in seconds; peak memory: the largest.",
    ]
    for task in comparison.tasks:
        own = [row for row in rows if row.task == task]
        parts += [*_score_section(task, own), *_difference_section(differences.get(task), own)]
        parts += _rate_section(own)
    parts += _average_section(averages(rows, len(comparison.tasks)), rows)
    if failures:
        lines = (
            f"* {cell}: {reason} (`{folder_of(comparison, cell)}`)"
            for cell, reason in failures.items()
        )
        parts += ["## Failed runs", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _dev_text(comparison: Comparison) -> str:
    """How many examples choose the learning rates: ``500; cb: 50``."""
    own = {name: task.dev_examples for name, task in comparison.tasks.items() if task.dev_examples}
    parts = [f"{comparison.dev_examples:,}", *(f"{name}: {own[name]:,}" for name in own)]
    return "; ".join(parts)


def byte_text(count: float) -> str:
    """A size for reading."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _score_section(task: str, rows: Sequence[Row]) -> list[str]:
    unit = unit_of(rows)
    header = (
        "method",
        unit.label,
        "learning rate",
        "trained",
        "of all",
        "optimizer state",
        "peak memory",
        "s per step",
        "calibration s",
    )
    lines = []
    for row in rows:
        rate = "" if row.choice.rate is None else rate_text(row.choice.rate)
        if not row.results:
            lines.append((row.method, "failed", rate, *[""] * (len(header) - 3)))
            continue
        num_seeds = len(row.results) + row.num_failed
        failed = f" ({row.num_failed} of {num_seeds} seeds failed)" if row.num_failed else ""
        lines.append(
            (
                row.method,
                unit.write_all(row.scores) + failed,
                rate + (" ⚠" if row.choice.is_at_edge else ""),
                f"{row.cost('num_trainable'):,.0f}",
                _percent(row.cost("num_trainable") / row.cost("num_parameters")),
                byte_text(row.cost("optimizer_state_bytes")),
                byte_text(row.peak_memory_bytes),
                f"{row.cost('seconds_per_step'):.3g}",
                f"{row.cost('calibration_seconds'):.1f}",
            )
        )
    parts = [f"## {task}", _table(header, lines)]
    edges = [row.method for row in rows if row.choice.is_at_edge]
    if edges:
        parts.append(
            f"⚠ The learning rate of {', '.join(edges)} lies at the edge of its grid: a rate "
            "beyond may be better, so widen the grid."
        )
    return parts


def _difference_section(found: Differences | None, rows: Sequence[Row]) -> list[str]:
    if found is None:
        return []
    unit, title = unit_of(rows), f"### Difference from {found.reference}"
    lines = [
        (
            method,
            unit.write(d.value, sign=True),
            f"{unit.write(d.low, sign=True)} to {unit.write(d.high, sign=True)}",
            "real" if d.is_real else "",
        )
        for method, d in found.by_method.items()
    ]
    points = "difference (points)" if unit.is_share else "difference"
    parts = [title]
    if lines:
        parts.append(_table(("method", points, "95 % interval", ""), lines))
        parts.append(
            "Paired bootstrap over the test examples and the seeds; *real* where the interval "
            "excludes 0. Few seeds make it too narrow, and one says nothing of others. Intervals "
            "are not corrected for the number of comparisons."
        )
    return parts + ([found.note] if found.note else [])


def _rate_section(rows: Sequence[Row]) -> list[str]:
    rows = [row for row in rows if len(row.choice.rates) > 1]
    if not rows:
        return []
    unit = Unit(next((row.choice.metric for row in rows if row.choice.metric), "score"))
    width = max(len(row.choice.rates) for row in rows)
    lines = []
    for row in rows:
        choice = row.choice
        cells = []
        for rate, score in zip(choice.rates, choice.scores, strict=True):
            text = f"{rate_text(rate)}: {'failed' if score is None else unit.write(score)}"
            cells.append(f"**{text}**" if rate == choice.rate else text)
        lines.append((row.method, *cells, *[""] * (width - len(cells))))
    header = ("method", *[""] * width)
    return [f"### Learning rates: {unit.label} on the development split", _table(header, lines)]


def _average_section(means: Mapping[str, Sequence[float]], rows: Sequence[Row]) -> list[str]:
    if not means:
        return []
    unit = Unit("average")
    lines = []
    for method, values in means.items():
        trained = [row for row in rows if row.method == method and row.results]
        share = [row.cost("num_trainable") / row.cost("num_parameters") for row in trained]
        lines.append(
            (
                method,
                unit.write_all(values) if values else "failed",
                _percent(fmean(share)) if share else "",
            )
        )
    return [
        "## Average over the tasks",
        _table(("method", "score (points of 100)", "trained, of all"), lines),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))
