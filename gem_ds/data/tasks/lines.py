r"""Objects with named fields and the place where they stand, which every error about them names.

A line of a file ends in `\n` or `\r\n` only: U+2028 and its like may stand inside strings. A
byte-order mark at the start is accepted. In a table a tab ends a cell, always: quotation marks are
ordinary characters, and nothing is escaped.
"""

from __future__ import annotations

import codecs
import json
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Fields = dict[str, object]

_JSON_TYPES: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Line:
    """An object, and where it stands: `number` counts the units of `path` from 1.

    What reads a field raises a ValueError if it is missing or something else.
    """

    path: Path
    number: int
    fields: Fields
    unit: str = "line"

    def value(self, field: str) -> object:
        """Whatever is in `field`."""
        if field not in self.fields:
            raise self.error(f"there is no field {field!r}; the line has {self.field_names()}.")
        return self.fields[field]

    def text(self, field: str) -> str:
        """The string in `field`."""
        return self.checked_text(self.value(field), f"the field {field!r}")

    def texts(self, field: str) -> tuple[str, ...]:
        """The list of strings in `field`."""
        values = self._container(field, list, "a list of strings")
        return tuple(
            self.checked_text(value, f"entry {number} of {field!r}")
            for number, value in enumerate(values, start=1)
        )

    def nested(self, field: str) -> Line:
        """The object in `field`, as a line of the same place."""
        return replace(self, fields=self._container(field, dict, "an object"))

    def nested_list(self, field: str) -> list[Line]:
        """The objects of the list in `field`, likewise."""
        values = self.fields.get(field)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise self.error(f"the field {field!r} must be a list of objects.")
        return [replace(self, fields=value) for value in values]

    def whole_number(self, field: str) -> int:
        """The whole number in `field`."""
        if type(value := self.fields.get(field)) is not int:
            raise self.error(f"the field {field!r} must be a whole number, not {value!r}.")
        return value

    def _container(self, field: str, kind: type, words: str) -> Any:
        value = self.fields.get(field)
        if not isinstance(value, kind):
            found = json_type(value) if field in self.fields else "missing"
            raise self.error(f"the field {field!r} must be {words}; it is {found}.")
        return value

    def checked_text(self, value: object, name: str) -> str:
        """`value` if it is a string that has a UTF-8 form, else ValueError about `name`."""
        if not isinstance(value, str):
            raise self.error(f"{name} must be a string, not {json_type(value)}.")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error(
                f"{name} holds half of a surrogate pair at character {error.start + 1}, which is "
                f"no text: write the whole character."
            ) from None
        return value

    def field_names(self) -> str:
        """The names of the fields for an error message."""
        return ", ".join(map(repr, self.fields)) or "no fields"

    def error(self, message: str) -> ValueError:
        """A ValueError which says where the line stands."""
        return ValueError(f"{self.path}, {self.unit} {self.number}: {message}")


def numbered(path: Path, objects: Iterable[Mapping[str, object]], unit: str) -> list[Line]:
    """Objects that are the units of a file or a data set, in their order."""
    return [Line(path, number, dict(fields), unit) for number, fields in enumerate(objects, 1)]


def read_hub(names: tuple[str, ...], split: str) -> list[Line]:
    """The rows of a split of a data set, of which `names` are address and configuration."""
    from datasets import load_dataset

    return numbered(Path(*names, split), load_dataset(*names)[split], "row")


def read_json(path: Path) -> object:
    """The value in a published file of one JSON document; ValueError if it holds none."""
    try:
        value: object = json.loads(_read_bytes(path))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8: download it again.") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: this is not JSON ({error.msg}, column {error.colno}); "
            f"download the file again."
        ) from None
    return value


def read_jsonl(path: Path) -> list[Line]:
    """The objects of a JSONL file, one to a line; blank lines are skipped."""
    lines = parse_jsonl(path, _read_bytes(path))
    if not lines:
        raise ValueError(f"{path} is empty: it must hold one JSON object per line.")
    return lines


def parse_jsonl(path: Path, content: bytes) -> list[Line]:
    """The lines of a JSONL file that has been read, perhaps none."""
    return [
        Line(path, number, _object(text, f"{path}, line {number}"))
        for number, text in _texts(path, content)
        if text.strip(string.whitespace)
    ]


def read_tsv(path: Path, header: tuple[str, ...] = (), *, skip_short: bool = False) -> list[Line]:
    """The rows of a table, each with its cells by column; empty lines are skipped.

    Without a `header` the first line names the columns. Rows that lack cells may be skipped.
    """
    rows = []
    for number, text in _texts(path, _read_bytes(path)):
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


def json_type(value: object) -> str:
    """The JSON name of a parsed value's type, with its article."""
    return _JSON_TYPES.get(type(value), "a number")


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"There is no file {path}: check the path.")
    return path.read_bytes()


def _texts(path: Path, content: bytes) -> Iterator[tuple[int, str]]:
    """What stands before each newline of a UTF-8 text, and the number of that line."""
    for number, raw in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        try:
            yield number, raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: byte {error.start + 1} of the line is not UTF-8; save the "
                f"file as UTF-8."
            ) from None


def _object(text: str, where: str) -> Fields:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: this is not JSON ({error.msg}, column {error.colno}); each line must be "
            f"one whole JSON object."
        ) from None
    except (ValueError, RecursionError):
        raise ValueError(
            f"{where}: this JSON has a number too long or lists too deep to read; shorten it."
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: each line must be a JSON object, not {json_type(value)}.")
    return value
