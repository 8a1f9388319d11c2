"""How far masks agree: between methods, between seeds, between tasks.

The overlap of two masks is the number of entries that they have in common over that of the smaller
one. Chance alone gives the share of the targets' entries that is selected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure
from steps.table import markdown

from gem_ds.files.mask import Mask

MasksBySeed = Mapping[str, Mapping[int, Mask]]
"""By method and seed."""


def overlap(one: Mask, other: Mask) -> float:
    """The share of the smaller mask that is in the other."""
    common = sum(
        len(np.intersect1d(one.indices[name].numpy(), index.numpy(), assume_unique=True))
        for name, index in other.indices.items()
        if name in one.indices
    )
    return common / min(one.num_selected, other.num_selected)


def budget_overlap(one: Mask, other: Mask) -> float:
    """The same of budgets: the sum over the matrices of the smaller one."""
    common = sum(
        min(one.indices[name].numel(), index.numel())
        for name, index in other.indices.items()
        if name in one.indices
    )
    return common / min(one.num_selected, other.num_selected)


def overlap_matrix(masks: MasksBySeed) -> np.ndarray:
    """[methods, methods]: means over the seeds that both have; within one over pairs of seeds."""
    matrix = np.full((len(masks), len(masks)), math.nan)
    for i, own in enumerate(masks.values()):
        for j, others in enumerate(masks.values()):
            if i == j:
                pairs = list(combinations(own.values(), 2))
            else:
                pairs = [(own[seed], others[seed]) for seed in own.keys() & others.keys()]
            if pairs and j >= i:
                matrix[i, j] = matrix[j, i] = fmean(overlap(*pair) for pair in pairs)
    return matrix


def overlap_table(tasks: Mapping[str, MasksBySeed]) -> str:
    """By method: between seeds of a task, and between tasks at one seed; and what chance gives."""
    rows = []
    methods = dict.fromkeys(method for masks in tasks.values() for method in masks)
    for method in methods:
        own = [masks[method] for masks in tasks.values() if method in masks]
        seeds = [pair for one in own for pair in combinations(one.values(), 2)]
        across = [
            (one[seed], other[seed])
            for one, other in combinations(own, 2)
            for seed in one.keys() & other.keys()
        ]
        row = {"method": method}
        for title, pairs in (("seeds", seeds), ("tasks", across)):
            row[f"masks of two {title}"] = _mean([overlap(*pair) for pair in pairs])
            row[f"budgets of two {title}"] = _mean([budget_overlap(*pair) for pair in pairs])
        row["by chance"] = f"{fmean(chance(mask) for one in own for mask in one.values()):.3f}"
        rows.append(row)
    return markdown(rows) if rows else ""


def chance(mask: Mask) -> float:
    """The overlap of an independent mask with these budgets: sum of k^2 / n over the matrices."""
    return (
        sum(
            index.numel() ** 2 / math.prod(mask.weights[name].shape)
            for name, index in mask.indices.items()
        )
        / mask.num_selected
    )


def overlap_figure(tasks: Mapping[str, MasksBySeed]) -> Figure:
    """A panel per task: overlap of the methods' masks, on the diagonal that of two seeds'."""
    size = max(len(masks) for masks in tasks.values())
    side = 0.55 * size + 1.6
    figure = Figure(figsize=(side * len(tasks) + 0.8, side), layout="constrained")
    grid = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, (task, masks) in zip(grid, tasks.items(), strict=True):
        matrix = overlap_matrix(masks)
        image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        names = list(masks)
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(task)
        for (row, column), value in np.ndenumerate(matrix):
            if not math.isnan(value):
                colour = "black" if value > 0.6 else "white"
                look = {"ha": "center", "va": "center", "fontsize": 7.5, "color": colour}
                axes.text(column, row, f"{value:.2f}", **look)
    figure.suptitle("overlap of masks at the same seed; on the diagonal of two seeds", fontsize=11)
    figure.colorbar(image, ax=grid, shrink=0.7)
    return figure


def _mean(values: list[float]) -> str:
    return f"{fmean(values):.3f}" if values else ""
