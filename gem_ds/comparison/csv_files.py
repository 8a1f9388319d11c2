"""The raw numbers of a comparison as CSV: a record per task and method, and one per run."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gem_ds.comparison.cells import Cell, folder_of
from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.results import COSTS, read_result
from gem_ds.comparison.table import Row, mean_and_std


def table_csv(rows: Sequence[Row]) -> str:
    """The text of table.csv."""
    return _csv(map(_table_record, rows))


def cells_csv(comparison: Comparison, cells: Sequence[Cell]) -> str:
    """The text of cells.csv."""
    return _csv(_cell_record(comparison, cell) for cell in cells)


def _table_record(row: Row) -> dict[str, Any]:
    mean, std = mean_and_std(row.scores) if row.results else (math.nan, math.nan)
    choice = row.choice
    record = {
        "task": row.task,
        "method": row.method,
        "metric": row.metric,
        "mean": mean,
        "std": std,
        "num_seeds": len(row.results),
        "num_failed": row.num_failed,
        "learning_rate": choice.rate,
        "is_at_edge": choice.is_at_edge,
        "dev_metric": choice.metric,
        "dev_score": choice.score,
    }
    costs = {name: row.cost(name) if row.results else math.nan for name in COSTS}
    if row.results:
        costs |= {name: int(value) for name, value in costs.items() if name.startswith("num_")}
        costs["peak_memory_bytes"] = row.peak_memory_bytes
    return record | costs


def _cell_record(comparison: Comparison, cell: Cell) -> dict[str, Any]:
    try:
        result = read_result(comparison, cell)
    except ValueError:
        result = None
    record = {
        "task": cell.task,
        "method": cell.method,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "split": cell.split,
        "status": "failed" if result is None else "finished",
        "metric": "" if result is None else result.metric,
        "score": math.nan if result is None else result.score,
    }
    costs = {name: math.nan if result is None else result.costs[name] for name in COSTS}
    folder = folder_of(comparison, cell).relative_to(comparison.output_dir)
    return record | costs | {"folder": str(folder)}


def _csv(records: Iterable[Mapping[str, Any]]) -> str:
    """With a header; what is not a number stays empty."""
    text, writer = io.StringIO(), None
    for record in records:
        writer = writer or csv.DictWriter(text, list(record), lineterminator="\n")
        if not text.tell():
            writer.writeheader()
        writer.writerow(
            {
                name: "" if isinstance(value, float) and math.isnan(value) else value
                for name, value in record.items()
            }
        )
    return text.getvalue()
