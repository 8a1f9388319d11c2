r"""Tables of tab-separated text, with errors that name the line.

A line is a row and a tab ends a cell, always: quotation marks are ordinary characters, and nothing
is escaped. Lines end in `\n` or `\r\n` only; a byte-order mark at the start is accepted.
"""

from __future__ import annotations

import codecs
from pathlib import Path

from gem_ds.data.tasks.jsonl import Line, read_bytes


def read_tsv(path: Path, header: tuple[str, ...] = (), *, skip_short: bool = False) -> list[Line]:
    """Read the rows of a UTF-8 table, each with its cells by column; empty lines are skipped.

    Args:
        path: The file.
        header: The names of the columns; those of the first line if none are given.
        skip_short: Whether rows that lack cells are left out instead of refused.

    Raises:
        ValueError: The file is missing or has no rows, or a line is not UTF-8 or has another number
            of cells than there are columns; the sentence names the file and the line.
    """
    rows = []
    content = read_bytes(path).removeprefix(codecs.BOM_UTF8)
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if not (raw := raw.removesuffix(b"\r")):
            continue
        cells = _decode(raw, f"{path}, line {number}").split("\t")
        if not header:
            header = tuple(cells)
        elif len(cells) == len(header):
            rows.append(Line(path, number, dict(zip(header, cells, strict=True))))
        elif len(cells) > len(header) or not skip_short:
            raise ValueError(
                f"{path}, line {number}: the row has {len(cells)} cells and the table "
                f"{len(header)} columns; there must be a tab between two cells and nowhere else."
            )
    if not rows:
        raise ValueError(f"{path} is empty: it must hold a row on each line.")
    return rows


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8."
        ) from None
