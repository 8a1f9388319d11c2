"""What the pictures have in common: panels in a grid, and a colour and a marker for each method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from analysis.runs import place_of_method
from gem_ds.comparison.plots import STYLES
from gem_ds.select.rules import RULES


def look(method: str) -> dict[str, Any]:
    """How a method is drawn: as in the pictures of a comparison, dashed if it is no sparse one."""
    colour, (fill, marker) = STYLES[method]
    line = {"lw": 1.2, "ls": "-" if method in RULES else "--"}
    return line | {"color": colour, "marker": marker, "fillstyle": fill, "ms": 6}


def panels(
    rows: Sequence[str], columns: Sequence[str], methods: Iterable[str]
) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """A panel for each row and column, and one legend for the methods that are there."""
    size = 3.8 * len(columns) + 1.8, 3.0 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    shown = sorted(set(methods), key=place_of_method)
    handles = [Line2D([], [], label=method, **look(method)) for method in shown]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    named = {
        (row, column): grid[i, j] for i, row in enumerate(rows) for j, column in enumerate(columns)
    }
    return figure, named


def set_scale(axes: Axes) -> None:
    """A logarithmic ordinate where the values span much, with plain numbers."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()])
    values = values[values > 0]
    if not len(values) or values.max() < 4 * values.min():
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
