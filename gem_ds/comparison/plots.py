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
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from gem_ds.comparison.budget_plot import TEXT, budget_figure
from gem_ds.comparison.cells import folder_of
from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.table import REFERENCE, Row, mean_and_std
from gem_ds.comparison.unit import Unit, unit_of
from gem_ds.files.atomic import atomic_write
from gem_ds.files.mask import Mask

#: Colour and marker by method.
STYLES = {
    "gem": ("#D55E00", "*"),
    "ratio": ("#E69F00", "o"),
    "gradient": ("#009E73", "s"),
    "entropy_gradient": ("#009E73", "P"),
    "magnitude": ("#56B4E9", "^"),
    "random": ("#7F7F7F", "X"),
    "supertuning": ("#CC79A7", "v"),
    "full": ("#000000", "D"),
    "bitfit": ("#7F7F7F", "p"),
    "lora": ("#0072B2", "h"),
    "shira": ("#CC79A7", "d"),
    "ia3": ("#56B4E9", "<"),
}

MAX_COLUMNS = 3


def write_plots(comparison: Comparison, rows: Sequence[Row]) -> None:
    """Write the pictures that there is something to show in.

    Raises:
        OSError: a file cannot be written.
    """
    folder = comparison.output_dir
    if any(row.results for row in rows):
        save(score_figure(comparison, rows), folder / "score_vs_parameters.png")
    if any(score is not None for row in rows for score in row.choice.scores):
        save(rate_figure(comparison, rows), folder / "learning_rates.png")
    for task in comparison.tasks:
        masks = {}
        for row in rows:
            for cell in list(row.results)[:1] if row.task == task else ():
                path = folder_of(comparison, cell) / "mask.safetensors"
                if path.exists():
                    masks[row.method] = Mask.load(path)
        if masks:
            save(budget_figure(task, masks), folder / f"budget_{task}.png")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    FigureCanvasAgg(figure)
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=160))


def score_figure(comparison: Comparison, rows: Sequence[Row]) -> Figure:
    """Test score against trained parameters; bars are standard deviations over the seeds."""
    figure, panels = _panels(list(comparison.tasks))
    for task, axes in panels.items():
        own = [row for row in rows if row.task == task]
        unit, done = unit_of(own), [row for row in own if row.results]
        places = side_by_side([row.cost("num_trainable") for row in done])
        for row, place in zip(done, places, strict=True):
            mean, std = mean_and_std(row.scores)
            colour, marker = STYLES[row.method]
            axes.errorbar(
                place,
                mean * unit.factor,
                yerr=None if math.isnan(std) else std * unit.factor,
                color=colour,
                marker=marker,
                markersize=11 if marker == "*" else 7,
                elinewidth=1.2,
                capsize=2.5,
                linestyle="none",
                zorder=_order(row.method),
            )
        is_shifted = places != [row.cost("num_trainable") for row in done]
        note = " (equal ones side by side)" if is_shifted else ""
        _finish(axes, task, f"trained parameters{note}", unit.label)
        if places:
            _span(axes, places, margin=2.2)
            axes.xaxis.set_major_formatter(FuncFormatter(_count_text))
    _legend(figure, rows)
    return figure


def rate_figure(comparison: Comparison, rows: Sequence[Row]) -> Figure:
    """Development score against learning rate; the chosen rates have a ring."""
    figure, panels = _panels(list(comparison.tasks))
    for task, axes in panels.items():
        own = [row for row in rows if row.task == task]
        unit = Unit(next((row.choice.metric for row in own if row.choice.metric), "score"))
        for row in own:
            colour, marker = STYLES[row.method]
            pairs = zip(row.choice.rates, row.choice.scores, strict=True)
            points = [(rate, s * unit.factor) for rate, s in pairs if s is not None]
            if not points:
                continue
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                lw=1.4,
                ms=6,
                zorder=_order(row.method),
            )
            chosen = [point for point in points if point[0] == row.choice.rate]
            axes.plot(
                *zip(*chosen, strict=True),
                marker="o",
                ms=13,
                mfc="none",
                mec=colour,
                mew=1.3,
                linestyle="none",
            )
        _finish(axes, f"{task}, development split", "learning rate", unit.label)
        _span(axes, [rate for row in own for rate in row.choice.rates], margin=1.5)
        seen = [score for row in own for score in row.choice.scores if score is not None]
        if unit.is_loss and max(seen) > 4 * min(seen) > 0:
            _scale_by_factors(axes)
    _legend(figure, rows, rings=True)
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


def _order(method: str) -> float:
    """What lies on top: the method that the others are measured against."""
    return 4.0 if method == REFERENCE else 3.0


def _legend(figure: Figure, rows: Sequence[Row], *, rings: bool = False) -> None:
    """One legend for all panels, beside them."""
    handles = []
    for method in dict.fromkeys(row.method for row in rows):
        colour, marker = STYLES[method]
        size = 11 if marker == "*" else 7
        handles.append(
            Line2D([], [], color=colour, marker=marker, ms=size, linestyle="none", label=method)
        )
    if rings:
        handles.append(
            Line2D([], [], mfc="none", mec=TEXT, marker="o", ms=11, ls="none", label="chosen")
        )
    figure.legend(handles=handles, loc="outside right center", frameon=False, labelcolor=TEXT)


def side_by_side(counts: Sequence[float]) -> list[float]:
    """Abscissas, those of (nearly) equal counts a little apart so that none hides another."""
    places = list(counts)
    ordered = sorted(range(len(counts)), key=lambda i: counts[i])
    groups: list[list[int]] = []
    for index in ordered:
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
