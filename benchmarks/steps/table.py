"""A table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Rows of the same columns, whose titles are the keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
