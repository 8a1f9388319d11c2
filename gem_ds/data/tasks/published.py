"""Files of published tasks: one JSON document, a table, or a data set on the Hub.

In a table a tab ends a cell, always: quotation marks are ordinary characters, and nothing is
escaped.
"""

import json
from pathlib import Path

from gem_ds.data.tasks.lines import Line, numbered, read_bytes, texts_of


def read_hub(names: tuple[str, ...], split: str) -> list[Line]:
    """The rows of a split of a data set, of which `names` are address and configuration."""
    from datasets import load_dataset

    return numbered(Path(*names, split), load_dataset(*names)[split], "row")


def read_json(path: Path) -> object:
    """The value in a published file of one JSON document; ValueError if it holds none."""
    try:
        value: object = json.loads(read_bytes(path))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8: download it again.") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: this is not JSON ({error.msg}, column {error.colno}); "
            f"download the file again."
        ) from None
    return value


def read_tsv(path: Path, header: tuple[str, ...] = (), *, skip_short: bool = False) -> list[Line]:
    """The rows of a table, each with its cells by column; empty lines are skipped.

    Without a `header` the first line names the columns. Rows that lack cells may be skipped.
    """
    rows = []
    for number, text in texts_of(path, read_bytes(path)):
        if not (text := text.removesuffix("\r")):
            continue
        cells = text.split("\t")
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
