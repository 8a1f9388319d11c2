"""The sections of the page, each as HTML: what is counted, as charts and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from gem_ds.files.mask import Mask
from gem_ds.report.charts import NUM_COLOURS, Line, bars, heat, legend, lines
from gem_ds.report.places import table_of
from gem_ds.report.spread import (
    BINS_A_DECADE,
    FIRST_DECADE,
    NUM_SHARES,
    NUM_SLICES,
    Moves,
    Spread,
)

_SIDES = ("rows", "columns")


def facts_of(facts: Mapping[str, str]) -> str:
    """Numbers in boxes."""
    cells = (f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in facts.items())
    return f'<div class="facts">{"".join(cells)}</div>'


def budget(mask: Mask) -> str:
    """By layer and module."""
    shares = {
        name: indices.numel() / math.prod(mask.weights[name].shape)
        for name, indices in mask.indices.items()
    }
    chart = heat(table_of(shares), "{:.3%}", "share of each weight's entries, by layer and module")
    return section(
        "Budget",
        "Which share of each weight was selected; rows are layers, columns modules.",
        f'<div class="wide">{chart}</div>',
    )


def _largest(found: Mapping[str, Spread]) -> list[tuple[str, Spread]]:
    return [item for item in found.items() if item[1].num_entries][:NUM_COLOURS]


def places(found: Mapping[str, Spread]) -> str:
    """Along the rows and columns."""
    charts = []
    for module, spread in _largest(found):
        series = []
        for colour, (side, totals) in enumerate(zip(_SIDES, spread.profiles, strict=True)):
            shares = enumerate((totals / spread.num_entries).tolist())
            points = [((i + 0.5) / NUM_SLICES, share) for i, share in shares]
            series.append(Line(side, points, colour))
        even = Line("an even spread", [(0, 1), (1, 1)], is_dashed=True)
        chart = lines(
            [*series, even],
            f"{module}: entries along rows and columns",
            "place in the weight",
            height=150,
            from_zero=True,
            y_format="{:.2g}",
        )
        charts.append((module, chart))
    keys = legend([("rows", "c0"), ("columns", "c1"), ("an even spread: 1", "dashed")])
    return section(
        "Where in the rows and columns",
        f"Entries in each of {NUM_SLICES} equal slices of the rows and of the columns, as a "
        "multiple of what an even spread has there; over all layers.",
        keys + _row(charts),
    )


def concentrated(found: Mapping[str, Spread]) -> str:
    """How many entries the fullest rows and columns have."""
    largest = _largest(found)
    charts = []
    for i, side in enumerate(_SIDES):
        series = []
        for colour, (module, spread) in enumerate(largest):
            shares = enumerate((spread.curves[i] / spread.num_entries).tolist())
            points = [(j / NUM_SHARES, share) for j, share in shares]
            series.append(Line(module, points, colour))
        chart = lines(
            series,
            f"share of the entries in the fullest {side}",
            f"share of the {side}, the fullest first",
            from_zero=True,
            y_format="{:.0%}",
        )
        charts.append((side, chart))
    keys = legend([(module, f"c{colour}") for colour, (module, _) in enumerate(largest)])
    rows = [
        (
            module,
            f"{spread.num_entries:,}",
            f"{spread.num_entries / spread.num_parameters:.3%}",
            *(_tenth(spread, side) for side in (0, 1)),
        )
        for module, spread in found.items()
    ]
    header = ("module", "entries", "share", "in 1/10 of rows", "of columns")
    return section(
        "How concentrated",
        "Which share of a weight's entries its fullest rows, or columns, have; in the table in the "
        "fullest tenth of them, and in brackets what as many entries drawn by chance have there.",
        keys + _row(charts) + _table(header, rows),
    )


def _tenth(spread: Spread, side: int) -> str:
    if not spread.num_entries:
        return ""
    at = NUM_SHARES // 10
    found, chance = (float(c[side][at]) for c in (spread.curves, spread.by_chance))
    return f"{found / spread.num_entries:.0%} ({chance / spread.num_entries:.0%})"


def moved(found: Mapping[str, Moves]) -> str:
    """How far values moved."""
    total = sum(each.num_entries for each in found.values())
    histogram: Any = sum(each.histogram for each in found.values())
    step = BINS_A_DECADE // 4
    heights = {
        FIRST_DECADE + i / BINS_A_DECADE: int(histogram[i : i + step].sum()) / total
        for i in range(0, len(histogram), step)
    }
    filled = [x for x, y in heights.items() if y]
    shown = {x: y for x, y in heights.items() if filled and filled[0] <= x <= filled[-1]}
    chart = bars(shown, 0.25, "how far values moved", "|change| / |value before|") if shown else ""
    rows = [
        (
            module,
            f"{1 - each.num_unchanged / max(1, each.num_entries):.1%}",
            "" if each.median is None else f"{each.median:.2g}",
            f"{each.num_from_zero:,}",
        )
        for module, each in found.items()
    ]
    header = ("module", "moved", "median move", "from 0")
    return section(
        "How far values moved",
        "The change of each value relative to what it was, as a share of the entries; 1 is a "
        "change as large as the value.",
        f'<div class="row"><div>{chart}</div><div>{_table(header, rows)}</div></div>',
    )


def curves(history: Sequence[Mapping[str, Any]]) -> str:
    """Losses, scores and rates by step; empty without any."""

    def series(key: str, colour: int, has_dots: bool) -> list[Line]:
        points = [
            (entry["step"], float(entry[key]))
            for entry in history
            if isinstance(entry.get(key), int | float) and math.isfinite(entry[key])
        ]
        return [Line(key, points, colour, has_dots=has_dots)] if points else []

    charts = []
    if losses := [*series("loss", 0, False), *series("eval_loss", 1, True)]:
        names_of = {"loss": "loss", "eval_loss": "held-out loss"}
        keys = legend([(names_of[line.name], f"c{line.colour}") for line in losses])
        charts.append(("loss", lines(losses, "loss by step", "step") + keys))
    names = dict.fromkeys(key for entry in history for key in entry if key.startswith("eval_"))
    for key in [name for name in names if name != "eval_loss"] + ["learning_rate", "grad_norm"]:
        if found := series(key, 2, len(history) < 40):
            charts.append((key, lines(found, f"{key} by step", "step")))
    return section("Curves", "", _row(charts)) if charts else ""


def _row(charts: Iterable[tuple[str, str]]) -> str:
    cells = (f"<div><h3>{escape(title)}</h3>{chart}</div>" for title, chart in charts)
    return f'<div class="row">{"".join(cells)}</div>'


def section(title: str, about: str, content: str = "") -> str:
    """A heading, what it is about, and what follows."""
    return f"<h2>{escape(title)}</h2>" + (f"<p>{escape(about)}</p>" if about else "") + content


def table_section(title: str, values: Mapping[str, Any]) -> str:
    """Names and values under a heading; empty without any."""
    if not values:
        return ""
    rows = [(name, _told(value)) for name, value in values.items()]
    return section(title, "", _table(None, rows))


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def _table(header: Sequence[str] | None, rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ["", *[' class="n"'] * (len(cells) - 1)] if header else ["", ""]
        found = (f"<{tag}{k}>{escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(found)}</tr>"

    head, kind = (line(header, "th"), ' class="numbers"') if header else ("", "")
    lines_of = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table{kind}>{head}{lines_of}</table></div>'
