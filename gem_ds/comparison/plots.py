"""The pictures of a comparison.

    score_vs_parameters.png    test score against trained parameters
    learning_rates.png         development score against learning rate
    budget_<task>.png          which layers and modules the sparse methods' entries lie in

Colours are those of Okabe and Ito, which colour-blind readers tell apart; each method has a marker
of its own, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from gem_ds.comparison.bootstrap import REFERENCE
from gem_ds.comparison.budget_plot import TEXT, budget_figure
from gem_ds.comparison.cells import folder_of
from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.markdown import unit_of
from gem_ds.comparison.metrics import Unit
from gem_ds.comparison.table import aim_of, finished
from gem_ds.files.atomic import atomic_write
from gem_ds.files.mask import Mask
from gem_ds.train.methods import METHODS

COLOURS = (
    *("#D55E00", "#E69F00", "#009E73", "#009E73", "#56B4E9", "#7F7F7F", "#CC79A7", "#000000"),
    *("#7F7F7F", "#0072B2", "#CC79A7", "#56B4E9"),
)

#: Colour and marker by method, in the order of the table of methods.
STYLES = dict(zip(METHODS, zip(cycle(COLOURS), "*osP^XvDphd<>8H", strict=False), strict=False))

MAX_COLUMNS = 3


def write_plots(comparison: Comparison, table: pd.DataFrame, cells: pd.DataFrame) -> None:
    """Write the pictures that there is something to show in."""
    folder = comparison.output_dir
    if any(table.num_seeds > 0):
        save(score_figure(table), folder / "score_vs_parameters.png")
    if any(cells.score[cells.split == "dev"].notna()):
        save(rate_figure(comparison, table, cells), folder / "learning_rates.png")
    for task in comparison.tasks:
        runs = finished(cells, task, "test").drop_duplicates("method")
        paths = {c.method: folder_of(comparison, c) / "mask.safetensors" for c in runs.cell}
        masks = {method: Mask.load(path) for method, path in paths.items() if path.exists()}
        if masks:
            save(budget_figure(task, masks), folder / f"budget_{task}.png")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    FigureCanvasAgg(figure)
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=160))


def score_figure(table: pd.DataFrame) -> Figure:
    """Test score against trained parameters; bars are standard deviations over the seeds."""
    figure, panels = _panels(list(table.task.unique()))
    for task, axes in panels.items():
        own = table[table.task == task]
        unit, done = unit_of(own), own[own.num_seeds > 0]
        places = side_by_side(list(done.num_trainable))
        for row, place in zip(done.itertuples(), places, strict=True):
            error = None if math.isnan(row.std) else row.std * unit.factor
            bar: dict[str, Any] = {"elinewidth": 1.2, "capsize": 2.5, "linestyle": "none"}
            axes.errorbar(place, row.mean * unit.factor, yerr=error, **bar, **_look(row.method))
        note = " (equal ones side by side)" if places != list(done.num_trainable) else ""
        _finish(axes, task, f"trained parameters{note}", unit.label)
        if places:
            _span(axes, places, margin=2.2)
            axes.xaxis.set_major_formatter(FuncFormatter(_count_text))
    _legend(figure, table)
    return figure


def rate_figure(comparison: Comparison, table: pd.DataFrame, cells: pd.DataFrame) -> Figure:
    """Development score against learning rate; the chosen rates have a ring."""
    figure, panels = _panels(list(comparison.tasks))
    for task, axes in panels.items():
        own, seen = table[table.task == task], []
        unit = Unit(next(filter(None, own.dev_metric), "score"))
        for row in own.itertuples():
            scores = aim_of(comparison, finished(cells, task, "dev", row.method))[1] * unit.factor
            if scores.empty:
                continue
            seen += list(scores)
            look, rate = _look(row.method), row.learning_rate
            axes.plot(list(scores.index), list(scores), lw=1.4, **look | {"ms": 6})
            ring: dict[str, Any] = {
                "mfc": "none",
                "mec": look["color"],
                "mew": 1.3,
                "linestyle": "none",
            }
            axes.plot([rate], [scores[rate]], marker="o", ms=13, **ring)
        _finish(axes, f"{task}, development split", "learning rate", unit.label)
        grids = (comparison.methods[method].learning_rates for method in own.method)
        _span(axes, [rate for grid in grids for rate in grid], margin=1.5)
        if unit.is_loss and max(seen) > 4 * min(seen) > 0:
            _scale_by_factors(axes)
    _legend(figure, table, rings=True)
    return figure


def _panels(tasks: Sequence[str]) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a panel per task."""
    columns = min(len(tasks), MAX_COLUMNS)
    lines = math.ceil(len(tasks) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(4.4 * columns + 1.6, 3.5 * lines), layout=layout)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    return figure, dict(zip(tasks, panels, strict=False))


def _finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """What all panels have in common."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_title(title, color=TEXT, fontsize=11.5)
    axes.set_xlabel(x_label, color=TEXT)
    axes.set_ylabel(y_label, color=TEXT)
    axes.tick_params(colors=TEXT, labelsize=9)
    axes.grid(visible=True, color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#AAAAAA")
    axes.margins(y=0.12)


def _scale_by_factors(axes: Axes) -> None:
    """A rate that is too large may end at many times the loss of the others."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high < 3e3 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _span(axes: Axes, values: Sequence[float], *, margin: float) -> None:
    """Limits around the values, a decade apart at least so that a power of ten is among them."""
    low, high = min(values) / margin, max(values) * margin
    stretch = max(1.0, math.sqrt(10.5 * low / high))
    axes.set_xlim(low / stretch, high * stretch)


def _look(method: str) -> dict[str, Any]:
    """How its points are drawn; what the others are measured against lies on top."""
    colour, marker = STYLES[method]
    size = 11 if marker == "*" else 7  # a star looks smaller than the others
    order = 4.0 if method == REFERENCE else 3.0
    return {"color": colour, "marker": marker, "ms": size, "zorder": order}


def _legend(figure: Figure, table: pd.DataFrame, *, rings: bool = False) -> None:
    """One legend for all panels, beside them."""
    methods = table.method.unique()
    handles = [Line2D([], [], ls="none", label=name, **_look(name)) for name in methods]
    if rings:
        look: dict[str, Any] = {"mfc": "none", "mec": TEXT, "marker": "o", "ms": 11, "ls": "none"}
        handles.append(Line2D([], [], label="chosen", **look))
    figure.legend(handles=handles, loc="outside right center", frameon=False, labelcolor=TEXT)


def side_by_side(counts: Sequence[float]) -> list[float]:
    """Abscissas, those of (nearly) equal counts a little apart so that none hides another."""
    places, groups = list(counts), list[list[int]]()
    for index in sorted(range(len(counts)), key=lambda i: counts[i]):
        if groups and counts[index] <= counts[groups[-1][0]] * 1.1:
            groups[-1].append(index)
        else:
            groups.append([index])
    for group in groups:
        for rank, index in enumerate(sorted(group)):
            places[index] = counts[index] * 1.14 ** (rank - (len(group) - 1) / 2)
    return places


def _count_text(value: float, position: int) -> str:
    """1000 is 1k, and so on."""
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g}{letter}"
    return f"{value:g}"
