"""How a metric is written, in tables and on the axes of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gem_ds.comparison.metrics import is_correlation, is_loss
from gem_ds.comparison.table import Row, mean_and_std


class Unit:
    """How a metric is written: per cent, a correlation, or a loss."""

    def __init__(self, metric: str) -> None:
        self.is_loss = is_loss(metric)
        self.is_share = not (is_correlation(metric) or self.is_loss)
        self.factor = 100 if self.is_share else 1
        self.decimals = 1 if self.is_share else 3
        name = metric.replace("_", " ")
        self.label = f"{name} (%)" if self.is_share else name

    def write(self, value: float, *, sign: bool = False) -> str:
        """A score, or with its sign a difference."""
        text = f"{value * self.factor:.{self.decimals}f}"
        if float(text) == 0:
            text = text.removeprefix("-")
        return f"+{text}" if sign and float(text) > 0 else text

    def write_all(self, values: Sequence[float]) -> str:
        """Mean and standard deviation."""
        mean, std = mean_and_std(values)
        return self.write(mean) + ("" if math.isnan(std) else f" ± {self.write(std)}")


def unit_of(rows: Sequence[Row]) -> Unit:
    """That of a task."""
    return Unit(next((row.metric for row in rows if row.metric), "score"))
