"""JSON objects with the place where they stand: the lines of a JSONL file, and their like."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Line:
    """One JSON object of a JSONL file, and where it stands (`number` counts from 1).

    Families that keep objects elsewhere read them as lines too; `unit` is what they count.
    """

    path: Path
    number: int
    fields: dict[str, object]
    unit: str = "line"

    def text(self, field: str) -> str:
        """The string in `field`; ValueError if it is missing or no proper string."""
        if field not in self.fields:
            raise self.error(f"there is no field {field!r}; the line has {self.field_names()}.")
        return self.checked_text(self.fields[field], f"the field {field!r}")

    def texts(self, field: str) -> tuple[str, ...]:
        """The list of strings in `field`; ValueError if it is missing or something else."""
        values = self.fields.get(field)
        if not isinstance(values, list):
            kind = json_type(values) if field in self.fields else "missing"
            raise self.error(f"the field {field!r} must be a list of strings; it is {kind}.")
        return tuple(
            self.checked_text(value, f"entry {number} of {field!r}")
            for number, value in enumerate(values, start=1)
        )

    def nested(self, field: str) -> Line:
        """The object in `field`, as a line of the same place; ValueError if it is none."""
        if not isinstance(value := self.fields.get(field), dict):
            kind = json_type(value) if field in self.fields else "missing"
            raise self.error(f"the field {field!r} must be an object; it is {kind}.")
        return replace(self, fields=value)

    def nested_list(self, field: str) -> list[Line]:
        """The objects of the list in `field`, likewise; ValueError if it is something else."""
        values = self.fields.get(field)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise self.error(f"the field {field!r} must be a list of objects.")
        return [replace(self, fields=value) for value in values]

    def whole_number(self, field: str) -> int:
        """The whole number in `field`; ValueError if it is missing or something else."""
        if type(value := self.fields.get(field)) is not int:
            raise self.error(f"the field {field!r} must be a whole number, not {value!r}.")
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


def read_jsonl(path: Path) -> list[Line]:
    r"""Read every line of a UTF-8 JSONL file as one JSON object; blank lines are skipped.

    Lines end in `\n` or `\r\n` only: U+2028 and its like may stand inside strings. A byte-order
    mark at the start is accepted.

    Raises:
        ValueError: The file is missing or holds no object, or a line is not UTF-8, not JSON or not
            an object; the sentence names the file and the line.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}: check the path.")
    lines = parse_jsonl(path, path.read_bytes())
    if not lines:
        raise ValueError(f"{path} is empty: it must hold one JSON object per line.")
    return lines


def parse_jsonl(path: Path, content: bytes) -> list[Line]:
    """The lines of a JSONL file that has been read, perhaps none; raises as `read_jsonl`."""
    return [
        Line(path, number, _parse(raw, f"{path}, line {number}"))
        for number, raw in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1)
        if raw.strip()
    ]


def _parse(raw: bytes, where: str) -> dict[str, object]:
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8."
        ) from None
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


def json_type(value: object) -> str:
    """The JSON name of a parsed value's type, with its article."""
    names: dict[type, str] = {
        str: "a string",
        bool: "true or false",
        type(None): "null",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "a number")
