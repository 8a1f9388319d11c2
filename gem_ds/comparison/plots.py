"""The pictures of a comparison.

    score_vs_parameters.png    test score against trained parameters
    learning_rates.png         development score against learning rate
    budget_<task>.png          which layers and modules the sparse methods' entries lie in

Colours are those of Okabe and Ito, which colour-blind readers tell apart; each method has a marker
of its own, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle, product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from gem_ds.comparison.bootstrap import REFERENCE
from gem_ds.comparison.cells import folder_of
from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.markdown import unit_of
from gem_ds.comparison.table import finished
from gem_ds.files.atomic import atomic_write
from gem_ds.files.mask import Mask
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


def write_plots(comparison: Comparison, table: pd.DataFrame, cells: pd.DataFrame) -> None:
    """Write the pictures that there is something to show in."""
    figures = {}
    if any(table.num_seeds > 0):
        figures["score_vs_parameters"] = score_figure(table)
    if any(cells.score[cells.split == "dev"].notna()):
        figures["learning_rates"] = rate_figure(comparison, table, cells)
    for task in comparison.tasks:
        runs = finished(cells, task, "test").drop_duplicates("method")
        paths = {c.method: folder_of(comparison, c) / "mask.safetensors" for c in runs.cell}
        masks = {method: Mask.load(path) for method, path in paths.items() if path.exists()}
        if masks:
            figures[f"budget_{task}"] = budget_figure(task, masks)
    for name, figure in figures.items():
        write = partial(figure.savefig, format="png", dpi=160)
        atomic_write(comparison.output_dir / f"{name}.png", write)


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
    return figure, _panels(figure, tasks, columns)


def _panels(figure: Figure, names: Sequence[str], columns: int) -> dict[str, Axes]:
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


def budget_figure(task: str, masks: Mapping[str, Mask]) -> Figure:
    """A panel per method: share of its entries by layer (down) and module (across)."""
    places = {name: place_of(name) for mask in masks.values() for name in mask.indices}
    layers = sorted({layer for layer, _ in places.values()})
    modules = list(dict.fromkeys(module for _, module in places.values()))
    grids = {}
    for method, mask in masks.items():
        grid = np.full((len(layers), len(modules)), np.nan)
        for name, index in mask.indices.items():
            spot = layers.index(places[name][0]), modules.index(places[name][1])
            grid[spot] = np.nansum([grid[spot], 100 * index.numel() / mask.num_selected])
        grids[method] = grid
    top = max(float(np.nanmax(grid)) for grid in grids.values())
    lines = math.ceil(len(grids) / 4)
    columns = math.ceil(len(grids) / lines)
    width = max(1.9, 0.62 * len(modules) + 0.5)
    height = max(2.2, min(6.0, 0.32 * len(layers) + 0.6))
    figure = Figure(figsize=(columns * width + 1.5, lines * height + 1.3), layout="constrained")
    figure.suptitle(f"{task}: where the budget went", color=TEXT, fontsize=12)
    for method, axes in _panels(figure, list(grids), columns).items():
        grid = grids[method]
        image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=top, aspect="auto")
        axes.set_title(method, fontsize=10.5, color=TEXT)
        slanted: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(modules)), short_names(modules), **slanted)
        shown = range(0, len(layers), math.ceil(len(layers) / 16))
        axes.set_yticks(shown, ["" if layers[i] < 0 else str(layers[i]) for i in shown])
        axes.tick_params(length=0, labelsize=8.5, colors=TEXT)
        axes.spines[:].set_visible(False)
        if grid.size <= 60 and len(modules) <= 4:
            _write_in(axes, grid, top)
    for axes in figure.axes[::columns]:
        axes.set_ylabel("layer", color=TEXT)
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.8, pad=0.02)
    bar.set_label("share of the method's entries (%)", color=TEXT)
    bar.ax.tick_params(colors=TEXT, labelsize=8.5)
    bar.outline.set_visible(False)
    return figure


def place_of(weight: str) -> tuple[int, str]:
    """The layer (-1 outside of any) and the module of a weight by its name."""
    parts = weight.removesuffix(".weight")
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", parts)
    return (int(match[1]), match[2]) if match else (-1, parts)


def _write_in(axes: Axes, grid: np.ndarray, top: float) -> None:
    """The numbers into the fields, light on dark and dark on light."""
    for (line, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
            look["color"] = "black" if value > 0.6 * top else "white"
            axes.text(column, line, f"{value:.1f}", **look)


def short_names(modules: Sequence[str]) -> list[str]:
    """The last part of each name, or as many as tell it from the others."""

    def short_name(module: str) -> str:
        parts = module.split(".")
        for end in (".".join(parts[-count:]) for count in range(1, len(parts))):
            if sum(f".{other}".endswith(f".{end}") for other in modules) == 1:
                return end
        return module

    return [short_name(module) for module in modules]
