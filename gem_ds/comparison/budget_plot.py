"""Where the budget of a comparison's sparse methods went, as a picture: by layer and module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gem_ds.comparison.plots import TEXT, panels
from gem_ds.files.mask import Mask


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
    for method, axes in panels(figure, list(grids), columns).items():
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
