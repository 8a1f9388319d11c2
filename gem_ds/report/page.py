"""The page: one HTML file that needs nothing else, for a phone and a screen, dark and light."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gem_ds.files.mask import Mask
from gem_ds.report.charts import NUM_COLOURS
from gem_ds.report.sections import (
    budget,
    concentrated,
    curves,
    facts_of,
    moved,
    places,
    section,
    table_section,
)
from gem_ds.report.spread import Moves, spreads

_STYLE = """
:root{color-scheme:light dark;--paper:#fcfcfb;--ink:#1d1d1b;--soft:#6b6a66;--grid:#e2e1dc;
--c0:#2a6fdb;--c1:#d1562b;--c2:#12876a;--c3:#8a4fc7;--c4:#b8860b;--c5:#c23b7a;--c6:#4c7a1d;--c7:#5b6b7d}
@media(prefers-color-scheme:dark){:root{--paper:#161615;--ink:#ecebe7;--soft:#a3a19a;--grid:#33322f;
--c0:#6ea3f5;--c1:#f08a62;--c2:#4cc3a2;--c3:#bd93ee;--c4:#e0b64a;--c5:#ee82b4;--c6:#9ccb62;--c7:#9fb0c3}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:16px;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:.3em 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2em 0 .2em}
h3{font-size:.9rem;font-weight:600;margin:0;overflow-wrap:anywhere}
p{margin:.3em 0 .8em;max-width:46em;color:var(--soft)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:10px;margin:16px 0}
.facts div{border:1px solid var(--grid);border-radius:8px;padding:8px 12px;overflow-wrap:anywhere}
.facts b{display:block;font-size:1.15rem;font-weight:600}
.facts span{color:var(--soft);font-size:.8rem}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:20px}
.row>div,.wide{overflow-x:auto;min-width:0}
.wide svg{max-width:520px}
svg{display:block;width:100%;height:auto;font:11px system-ui,sans-serif}
svg text{fill:var(--soft)}
.end{text-anchor:end}.mid{text-anchor:middle}
.grid{stroke:var(--grid)}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.heat{fill:var(--c0)}
.dashed{stroke:var(--soft);stroke-dasharray:4 3}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.8rem;max-width:none}
.key{display:inline-block;width:14px;height:0;border-top:3px solid;margin-right:6px;
vertical-align:middle}
.key.dashed{border-top:2px dashed var(--soft)}
table{border-collapse:collapse;font-size:.85rem;width:100%}
th,td{text-align:left;padding:4px 12px 4px 0;border-bottom:1px solid var(--grid);
vertical-align:top;overflow-wrap:anywhere}
th{color:var(--soft);font-weight:500}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.numbers :is(td,th){white-space:nowrap}
""" + "".join(
    f".line.c{i}{{stroke:var(--c{i})}}.dot.c{i},.bar.c{i}{{fill:var(--c{i})}}"
    f".key.c{i}{{border-color:var(--c{i})}}\n"
    for i in range(NUM_COLOURS)
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none';style-src 'unsafe-inline';img-src data:">
<link rel="icon" href="data:,"><title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def page(
    title: str,
    facts: Mapping[str, str],
    *,
    mask: Mask | None,
    moves: Mapping[str, Moves] | None,
    no_moves: str,
    history: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> str:
    """The file's text; what is None or empty is left out. ``no_moves`` says why there are none."""
    parts = [facts_of(facts)]
    if mask is not None:
        found = spreads(mask)
        parts += [budget(mask), places(found), concentrated(found)]
        parts.append(moved(moves) if moves else section("How far", no_moves))
    parts += [curves(history), table_section("Results", results)]
    parts.append(table_section("Settings", settings))
    body = "\n".join(filter(None, parts))
    return _PAGE.format(title=escape(title), style=_STYLE, body=body)
