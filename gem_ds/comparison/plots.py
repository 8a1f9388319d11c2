"""Scores of a comparison as pictures: against trained parameters, and against learning rates.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; each method has a marker
of its own, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle, product
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from gem_ds.comparison.bootstrap import REFERENCE
from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.markdown import unit_of
from gem_ds.comparison.table import finished
from gem_ds.train.methods import METHODS

TEXT = "#333333"
COLOURS = (
    *("#D55E00", "#E69F00", "#009E73", "#009E73", "#56B4E9", "#7F7F7F", "#CC79A7", "#000000"),
    *("#7F7F7F", "#0072B2", "#CC79A7", "#56B4E9"),
)

#: How a marker is filled, and which: hollow ones where there are more methods than markers.
MARKERS = tuple(product(("full", "none"), "*osP^XvDphd<>8H"))


class _Styles(dict[str, tuple[str, tuple[str, str]]]):
    """Those of the methods, in the order of their table; a row of another name takes the next."""

    def __missing__(self, name: str) -> tuple[str, tuple[str, str]]:
        place = len(self)
        self[name] = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        return self[name]


#: Colour and marker of a row.
STYLES = _Styles(zip(METHODS, zip(cycle(COLOURS), MARKERS, strict=False), strict=False))

#: What is around the rates that were chosen.
_RING: dict[str, Any] = {"marker": "o", "mfc": "none", "ls": "none"}


class _Counts(EngFormatter):
    """1000 is 1k, and a billion 1B."""

    ENG_PREFIXES = {0: "", 3: "k", 6: "M", 9: "B"}  # noqa: RUF012


def score_figure(table: pd.DataFrame) -> Figure:
    """Test score against trained parameters; bars are standard deviations over the seeds."""
    figure, panels = _figure_of(list(table.task.unique()))
    for task, axes in panels.items():
        own = table[table.task == task]
        unit, done = unit_of(own.metric), own[own.num_seeds > 0]
        places = side_by_side(list(done.num_trainable))
        for row, place in zip(done.itertuples(), places, strict=True):
            error = None if math.isnan(row.std) else row.std * unit.factor
            look = _look(row.method) | {"elinewidth": 1.2, "capsize": 2.5, "linestyle": "none"}
            axes.errorbar(place, row.mean * unit.factor, yerr=error, **look)
        note = " (equal ones side by side)" if places != list(done.num_trainable) else ""
        _finish(axes, task, f"trained parameters{note}", unit.label)
        if places:
            _span(axes, places, margin=2.2)
            axes.xaxis.set_major_formatter(_Counts(sep=""))
    _legend(figure, table)
    return figure


def rate_figure(comparison: Comparison, table: pd.DataFrame, cells: pd.DataFrame) -> Figure:
    """Development score against learning rate; the chosen rates have a ring."""
    figure, panels = _figure_of(list(comparison.tasks))
    for task, axes in panels.items():
        own, seen = table[table.task == task], []
        unit = unit_of(own.dev_metric)
        for row in own.itertuples():
            tried = finished(cells, task, "dev", row.method)
            if tried.empty:
                continue
            scores, look = list(tried.aim * unit.factor), _look(row.method)
            axes.plot(list(tried.learning_rate), scores, lw=1.4, **look | {"ms": 6})
            ring = _RING | {"mec": look["color"], "mew": 1.3, "ms": 13}
            axes.plot([row.learning_rate], [row.dev_score * unit.factor], **ring)
            seen += scores
        _finish(axes, f"{task}, development split", "learning rate", unit.label)
        grids = (comparison.methods[method].learning_rates for method in own.method)
        _span(axes, [rate for grid in grids for rate in grid], margin=1.5)
        if unit.is_loss and max(seen) > 4 * min(seen) > 0:  # of a rate that is too large
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            factors = (1, 2, 3, 5) if high < 3e3 * low else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=factors))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
    _legend(figure, table, rings=True)
    return figure


def _figure_of(tasks: Sequence[str]) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a panel per task, three in a line."""
    columns = min(len(tasks), 3)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    size = 4.4 * columns + 1.6, 3.5 * math.ceil(len(tasks) / columns)
    figure = Figure(figsize=size, layout=layout)
    return figure, panels(figure, tasks, columns)


def panels(figure: Figure, names: Sequence[str], columns: int) -> dict[str, Axes]:
    """By name the panels of a figure, so many in a line."""
    lines = math.ceil(len(names) / columns)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    return dict(zip(names, panels, strict=False))


def _finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """What all panels have in common."""
    axes.set(xscale="log", axisbelow=True)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_title(title, color=TEXT, fontsize=11.5)
    axes.set_xlabel(x_label, color=TEXT)
    axes.set_ylabel(y_label, color=TEXT)
    axes.tick_params(colors=TEXT, labelsize=9)
    axes.grid(visible=True, color="#E4E4E4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#AAAAAA")
    axes.margins(y=0.12)


def _span(axes: Axes, values: Sequence[float], *, margin: float) -> None:
    """Limits around the values, a decade apart at least so that a power of ten is among them."""
    low, high = min(values) / margin, max(values) * margin
    stretch = max(1.0, math.sqrt(10.5 * low / high))
    axes.set_xlim(low / stretch, high * stretch)


def _look(method: str) -> dict[str, Any]:
    """How its points are drawn; what the others are measured against lies on top."""
    colour, (fill, marker) = STYLES[method]
    size = 11 if marker == "*" else 7  # a star looks smaller than the others
    order = 4.0 if method == REFERENCE else 3.0
    look = {"color": colour, "marker": marker, "fillstyle": fill}
    return look | {"ms": size, "zorder": order}


def _legend(figure: Figure, table: pd.DataFrame, *, rings: bool = False) -> None:
    """One legend for all panels, beside them."""
    methods = table.method.unique()
    handles = [Line2D([], [], ls="none", label=name, **_look(name)) for name in methods]
    if rings:
        handles.append(Line2D([], [], label="chosen", **_RING | {"mec": TEXT, "ms": 11}))
    fitting = {15: (0.5, 10.0), 24: (0.1, 8.5)}  # beside a panel
    spacing, size = next((fit for most, fit in fitting.items() if len(handles) <= most), (0.1, 7.5))
    look: dict[str, Any] = {"frameon": False, "labelcolor": TEXT, "labelspacing": spacing}
    look["fontsize"] = size
    figure.legend(handles=handles, loc="outside right center", **look)


def side_by_side(counts: Sequence[float]) -> list[float]:
    """Abscissas, those of (nearly) equal counts a little apart so that none hides another."""
    places, waiting = list(counts), sorted(range(len(counts)), key=lambda i: counts[i])
    while waiting:
        group = [index for index in waiting if counts[index] <= counts[waiting[0]] * 1.1]
        waiting = waiting[len(group) :]
        for rank, index in enumerate(sorted(group)):
            places[index] = counts[index] * 1.14 ** (rank - (len(group) - 1) / 2)
    return places
