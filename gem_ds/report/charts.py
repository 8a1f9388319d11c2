"""Charts as inline SVG, drawn 360 wide so that a phone shows their text as it is.

Colours are classes (``c0`` ... ``c7``) and variables of the page's style, for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import pandas as pd

WIDTH = 360
NUM_COLOURS = 8
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 34


@dataclass(frozen=True)
class Line:
    """Points of a line; a dashed one has the colour of the axes."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    is_dashed: bool = False
    has_dots: bool = False


def heat(table: pd.DataFrame, tell: str, label: str) -> str:
    """A table's numbers as shades of one colour; `tell` formats one, such as ``{:.2%}``."""
    left, labels = 44, [_shortened(str(m).rpartition(".")[2] or "other", 14) for m in table.columns]
    top = 20 + 4 * max(map(len, labels))  # they stand aslant
    width = max(WIDTH, left + 26 * table.shape[1] + 40)
    cell = (width - left - 40) / table.shape[1]
    height = max(5, min(16, 480 // table.shape[0]))
    largest = float(table.max(axis=None)) or 1.0
    parts = []
    for j, text in enumerate(map(escape, labels)):
        x = left + (j + 0.5) * cell
        parts.append(f'<text transform="translate({x:.1f} {top - 6}) rotate(-40)">{text}</text>')
    every = -(-12 // height)
    for i, (layer, row) in enumerate(table.iterrows()):
        y = top + i * height
        if i % every == 0:
            text = escape(_shortened(str(layer).rpartition(".")[2], 6))
            parts.append(f'<text class="end" x="{left - 5}" y="{y + height - 1}">{text}</text>')
        for j, number in enumerate(row):
            if not math.isnan(number):
                told = escape(f"{layer} {table.columns[j]}: {tell.format(number)}")
                parts.append(
                    f'<rect class="heat" x="{left + j * cell:.1f}" y="{y}" '
                    f'width="{cell - 1:.1f}" height="{height - (height > 7)}" '
                    f'fill-opacity="{0.06 + 0.94 * number / largest:.3f}">'
                    f"<title>{told}</title></rect>"
                )
    bottom = top + table.shape[0] * height
    parts += [
        f'<rect class="heat" x="{left + 26 * i}" y="{bottom + 10}" width="26" height="8" '
        f'fill-opacity="{0.06 + 0.94 * i / 5:.3f}"/>'
        for i in range(6)
    ]
    parts.append(f'<text class="end" x="{left - 5}" y="{bottom + 18}">0</text>')
    told = escape(f"{tell.format(largest)} of a weight")
    parts.append(f'<text x="{left + 160}" y="{bottom + 18}">{told}</text>')
    return _svg(width, bottom + 28, label, parts)


def lines(
    series: Sequence[Line],
    label: str,
    x_label: str,
    *,
    height: int = 200,
    from_zero: bool = False,
    y_format: str = "{:.2g}",
) -> str:
    """Lines over common axes, whose numbers stand at their ends and in the middle."""
    points = [point for line in series for point in line.points]
    xs, ys = zip(*points, strict=True)
    x_range, y_range = (min(xs), max(xs)), (0.0 if from_zero else min(ys), max(ys))
    x_of = _scale(x_range, (_LEFT, WIDTH - _RIGHT))
    y_of = _scale(y_range, (height - _BOTTOM, _TOP))
    parts = _axes(x_range, y_range, x_label, height, y_format)
    for line in series:
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line.points)
        style = "dashed" if line.is_dashed else f"c{line.colour % NUM_COLOURS}"
        title = f"<title>{escape(line.name)}</title>"
        parts.append(f'<polyline class="line {style}" points="{path}">{title}</polyline>')
        if line.has_dots or len(line.points) == 1:
            parts += [
                f'<circle class="dot {style}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3">'
                f"<title>{escape(line.name)}: {y:.4g} at {x:g}</title></circle>"
                for x, y in line.points
            ]
    return _svg(WIDTH, height, label, parts)


def bars(heights: Mapping[float, float], width: float, label: str, x_label: str) -> str:
    """Bars that begin at the keys and are `width` wide; x is an exponent of 10."""
    height = 200
    x_range = (math.floor(min(heights)), math.ceil(max(heights) + width))
    y_range = (0.0, max(heights.values()))
    x_of = _scale(x_range, (_LEFT, WIDTH - _RIGHT))
    y_of = _scale(y_range, (height - _BOTTOM, _TOP))
    every = -(-(x_range[1] - x_range[0]) // 6)
    ticks = {float(x): f"{10.0**x:g}" for x in range(x_range[0], x_range[1] + 1, every)}
    parts = _axes(x_range, y_range, x_label, height, "{:.0%}", ticks)
    for x, y in heights.items():
        told = f"{10**x:.2g} to {10 ** (x + width):.2g}: {y:.2%}"
        parts.append(
            f'<rect class="bar c0" x="{x_of(x):.1f}" y="{y_of(y):.1f}" '
            f'width="{x_of(x + width) - x_of(x) - 1:.1f}" '
            f'height="{y_of(0) - y_of(y):.1f}"><title>{told}</title></rect>'
        )
    return _svg(WIDTH, height, label, parts)


def legend(names: Sequence[tuple[str, str]]) -> str:
    """Names beside their colours' classes."""
    found = (f'<span><i class="key {style}"></i>{escape(name)}</span>' for name, style in names)
    return f'<p class="legend">{"".join(found)}</p>'


def _scale(values: tuple[float, float], places: tuple[float, float]) -> Callable[[float], float]:
    low, high = values
    step = (places[1] - places[0]) / ((high - low) or 1.0)
    return lambda value: places[0] + (value - low) * step


def _axes(
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_label: str,
    height: int,
    y_format: str,
    ticks: Mapping[float, str] | None = None,
) -> list[str]:
    bottom, right = height - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for share in (0, 0.5, 1):
        y = bottom + share * (_TOP - bottom)
        number = y_format.format(y_range[0] + share * (y_range[1] - y_range[0]))
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 5}" y="{y + 4:.1f}">{number}</text>')
    if ticks is None:
        middle = (x_range[0] + x_range[1]) / 2
        ticks = {x: f"{x:g}" for x in (x_range[0], middle, x_range[1])}
    x_of = _scale(x_range, (_LEFT, right))
    for x, told in ticks.items():
        anchor = "end" if x == x_range[1] else "mid" if x > x_range[0] else ""
        parts.append(f'<text class="{anchor}" x="{x_of(x):.1f}" y="{bottom + 14}">{told}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="mid" x="{middle}" y="{bottom + 28}">{escape(x_label)}</text>')
    return parts


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    style = f' style="min-width:{width}px"' if width > WIDTH else ""  # then it scrolls
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}"{style}>'
        f"{''.join(parts)}</svg>"
    )


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
