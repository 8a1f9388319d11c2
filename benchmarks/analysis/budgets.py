"""Where the budget went: by module, by depth, and over how many matrices it is spread."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from steps.table import markdown

from gem_ds.comparison.budget_plot import place_of, short_names
from gem_ds.files.mask import Mask
from gem_ds.train.summary import effective_layers

from .figures import look, panels, set_scale

Masks = Mapping[str, Sequence[Mask]]
"""By method those of its seeds."""


def budget_table(masks: Masks) -> str:
    """Of one task, means over the seeds; the layers in thirds from the input on."""
    rows = []
    for method, own in masks.items():
        shares = shares_of(own)
        modules = list(dict.fromkeys(module for _, module in shares))
        last = max(layer for layer, _ in shares)
        thirds = [0.0, 0.0, 0.0]
        for (layer, _), share in shares.items():
            thirds[max(0, 3 * layer // (last + 1))] += share
        counts = ([index.numel() for index in mask.indices.values()] for mask in own)
        spread = fmean(map(effective_layers, counts))
        row = {"method": method, "matrices": f"{spread:.1f} of {len(shares)}"}
        row["largest share"] = f"{max(shares.values()):.1%}"
        for module, name in zip(modules, short_names(modules), strict=True):
            share = sum(value for place, value in shares.items() if place[1] == module)
            row[name] = f"{share:.0%}"
        row["first, middle, last third"] = ", ".join(f"{third:.0%}" for third in thirds)
        rows.append(row)
    return markdown(rows) if rows else ""


def budget_figure(tasks: Mapping[str, Masks]) -> Figure:
    """Shares by layer, a row per module and a column per task."""
    shares = {
        (task, method): shares_of(own)
        for task, masks in tasks.items()
        for method, own in masks.items()
    }
    modules = list(dict.fromkeys(module for own in shares.values() for _, module in own))
    figure, axes = panels(modules, list(tasks), [method for _, method in shares])
    for (task, method), own in shares.items():
        for module, name in zip(modules, short_names(modules), strict=True):
            points = sorted((layer, 100 * v) for (layer, m), v in own.items() if m == module)
            here = axes[module, task]
            here.plot(*zip(*points, strict=True), **look(method) | {"ms": 3.5, "lw": 1.0})
            here.set(ylabel=f"{name}: share of budget (%)", xlabel="layer", title=task)
            here.xaxis.set_major_locator(MaxNLocator(integer=True))
    for here in axes.values():
        set_scale(here)
    return figure


def shares_of(masks: Sequence[Mask]) -> dict[tuple[int, str], float]:
    """By layer and module the share of the entries, mean over masks."""
    shares: dict[tuple[int, str], float] = defaultdict(float)
    for mask in masks:
        for name, index in mask.indices.items():
            shares[place_of(name)] += index.numel() / mask.num_selected / len(masks)
    return dict(shares)
