"""Rows of data that have columns: Parquet, tables of text, and any data set that `datasets` loads.

Arrow gives every object all the fields that any of them has, as null where there was none; these
are left out again but for a row's own columns. A class label becomes its name.
"""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gem_ds.data.tasks.lines import Line, numbered, texts_of

#: How the Hub calls the part that is held out, the best first.
HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")


def parquet_rows(path: Path, content: bytes) -> list[Line]:
    """The rows of a Parquet file."""
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import parquet

    try:
        table = parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no whole Parquet file: {reason}") from None
    return _rows(path, Dataset(InMemoryTable(table)))


def table_rows(path: Path, content: bytes) -> list[Line]:
    """The rows of a table of text whose first line names the columns, by commas or tabs."""
    text = "\n".join(line for _, line in texts_of(path, content))
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # a text may be any length
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    try:
        rows = list(csv.DictReader(io.StringIO(text, ""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} is no whole table: {error}.") from None
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"{path}, row {number}: it has not as many cells as the first line.")
    return numbered(path, rows, "row")


def dataset_splits(name: str, config: str | None) -> tuple[list[Line], list[Line], str | None]:
    """The training rows of a data set, those held out, and the name of that split if there is one.

    `name` is an address on the Hub or a folder, `config` which of several data sets there it is.
    """
    from datasets import load_dataset

    address = (name,) if config is None else (name, config)
    try:
        splits: Mapping[str, Any] = load_dataset(*address)
    except Exception as error:  # datasets raises whatever its many parts do
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"--dataset_name {name} cannot be loaded: {reason}.") from error
    if "train" not in splits:
        raise ValueError(
            f"--dataset_name {name} has no split 'train', but {', '.join(map(repr, splits))}: name "
            "another data set, or pass its files by --train_file."
        )
    held_out = next((split for split in HELD_OUT if split in splits), None)
    train, test = (
        [] if split is None else _rows(Path(name, split), splits[split])
        for split in ("train", held_out)
    )
    return train, test, held_out


def _rows(path: Path, dataset: Any) -> list[Line]:
    names = {
        column: feature.names
        for column, feature in dataset.features.items()
        if hasattr(feature, "names") and hasattr(feature, "int2str")
    }
    rows: Iterable[dict[str, Any]] = (
        {
            column: names[column][value]
            if column in names and value in range(len(names[column]))
            else _without_nulls(value)
            for column, value in row.items()
        }
        for row in dataset
    )
    return numbered(path, rows, "row")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
