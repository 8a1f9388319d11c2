"""Numbers by weight as a table of layers x modules, and as a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd


def place_of(name: str) -> tuple[int | str, str]:
    """Layer and module of a weight; outside of a layer, its own name and none."""
    module = name.removesuffix(".weight")
    parts = re.fullmatch(r".*?\.(\d+)\.(.+)", module)
    return (int(parts[1]), parts[2]) if parts else (module, "")


def table_of(numbers: Mapping[str, float]) -> pd.DataFrame:
    """A number for each weight; rows are layers, columns modules, in the order of the weights.

    ``model.layers.3.self_attn.q_proj.weight`` is row 3 and column ``self_attn.q_proj``; a weight
    outside of a layer has a row of its own name.
    """
    rows = [(*place_of(name), number) for name, number in numbers.items()]
    frame = pd.DataFrame(rows, columns=["layer", "module", "number"])
    table = frame.pivot(index="layer", columns="module", values="number")
    return table.reindex(index=frame["layer"].unique(), columns=frame["module"].unique())


def plot(table: pd.DataFrame, title: str, path: Path) -> None:
    """Write a table as a heat map, layers from the top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 1.2 * table.shape[1], 1.5 + 0.25 * table.shape[0]))
    axes = figure.subplots()
    image = axes.imshow(table.to_numpy(float), aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(table.shape[1]), table.columns, rotation=30, ha="right")
    step = max(1, table.shape[0] // 20)
    axes.set_yticks(range(0, table.shape[0], step), [str(row) for row in table.index[::step]])
    axes.set_ylabel("layer")
    axes.set_title(title)
    figure.colorbar(image, ax=axes)
    figure.savefig(path, bbox_inches="tight", dpi=150)
