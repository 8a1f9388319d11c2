r"""Objects with named fields and the place where they stand, which every error about them names.

A line of a file ends in `\n` or `\r\n` only: U+2028 and its like may stand inside strings. A
byte-order mark at the start is accepted.
"""

import bz2
import codecs
import gzip
import json
import lzma
import re
import string
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

Fields = dict[str, object]

_JSON_TYPES: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    dict: "an object",
}


#: By their first bytes: what packs a file, and how it is unpacked.
_PACKINGS: dict[bytes, tuple[str, Callable[[bytes], bytes]]] = {
    b"\x1f\x8b": ("gzip", gzip.decompress),
    b"BZh": ("bzip2", bz2.decompress),
    b"\xfd7zXZ": ("xz", lzma.decompress),
}
PARQUET = b"PAR1"
#: Likewise what is not read.
_FOREIGN = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "a SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"%PDF": "a PDF",
    b"\x80\x04": "a Python pickle",
    b"version https://git-lfs": "a pointer of Git LFS (`git lfs pull` fetches the file)",
    b"<": "a web page or XML",
}
#: Fields that may hold a list of objects which are no rows.
_OF_CHATS = ("messages", "conversations", "prompt", "completion", "tools")


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

    def nested(self, field: str) -> Self:
        """The object in `field`, as a line of the same place."""
        return replace(self, fields=self._container(field, dict, "an object"))

    def nested_list(self, field: str) -> list[Self]:
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

    @property
    def place(self) -> str:
        """Where the line stands."""
        return f"{self.path}, {self.unit} {self.number}"

    def error(self, message: str) -> ValueError:
        """A ValueError which says where the line stands."""
        return ValueError(f"{self.place}: {message}")


def numbered(path: Path, objects: Iterable[Mapping[str, object]], unit: str) -> list[Line]:
    """Objects that are the units of a file or a data set, in their order."""
    return [Line(path, number, dict(fields), unit) for number, fields in enumerate(objects, 1)]


def read_jsonl(path: Path) -> list[Line]:
    """The objects of a JSONL file, one to a line; blank lines are skipped."""
    lines = parse_jsonl(path, read_bytes(path))
    if not lines:
        raise ValueError(f"{path} is empty: it must hold one JSON object per line.")
    return lines


def parse_jsonl(path: Path, content: bytes) -> list[Line]:
    """The lines of a JSONL file that has been read, perhaps none."""
    return [
        Line(path, number, _object(text, f"{path}, line {number}"))
        for number, text in texts_of(path, content)
        if text.strip(string.whitespace)
    ]


def unpacked(path: Path) -> tuple[bytes, str]:
    """What the user's own file holds, texts in UTF-8, and how it was packed and encoded (", gzip").

    Raises:
        ValueError: There is no file, it is damaged, or of a form that is not read.
    """
    content, how = read_bytes(path), ""
    for magic, (name, unpack) in _PACKINGS.items():
        if content.startswith(magic):
            try:
                content, how = unpack(content), f", {name}"
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise ValueError(f"{path} is cut or damaged ({error}): fetch it again.") from None
    for magic, form in _FOREIGN.items():
        if content.startswith(magic):
            raise ValueError(f"{path} is {form}: write JSON Lines, a JSON array, CSV or Parquet.")
    encoding = json.detect_encoding(content)
    if encoding.startswith("utf-8") or content.startswith(PARQUET):
        return content, how
    try:
        return content.decode(encoding).encode(), f", {encoding.upper()}{how}"
    except UnicodeError as error:
        raise ValueError(f"{path} is no whole {encoding.upper()} text: {error}.") from None


def json_rows(path: Path, content: bytes) -> tuple[list[Line], str]:
    """The objects of JSON Lines, an array, or documents of several lines each, and which it is."""
    texts = texts_of(path, content)
    _, first = next((pair for pair in texts if pair[1].strip(string.whitespace)), (0, ""))
    start = first.lstrip(string.whitespace)[:1]
    if start and start not in '[{"' and not start.isdigit():
        raise ValueError(
            f"{path} is no JSON, as it begins with {first.strip()[:20]!r}: write an object on each "
            'line, for instance {"text": ...}; the name of a table ends in .csv or .tsv.'
        )
    if start != "[" and _is_whole(first):
        rows, form = parse_jsonl(path, content), "JSON Lines"
    else:
        values, form = _documents(path, "\n".join(text for _, text in texts_of(path, content)))
        unit = "entry" if form == "a JSON array" else "object"
        for number, value in enumerate(values, 1):
            if not isinstance(value, dict):
                found = json_type(value)
                raise ValueError(f"{path}, {unit} {number}: it must be an object, not {found}.")
        rows = numbered(path, values, unit)
    if not rows:
        raise ValueError(f"{path} is empty: it must hold one JSON object per line.")
    if len(rows) == 1 and len(rows[0].fields) == 1:  # {"data": [{...}, ...]}
        ((name, inner),) = rows[0].fields.items()
        if name not in _OF_CHATS and isinstance(inner, list) and inner:
            return rows[0].nested_list(name), f"a JSON array, {name!r}"
    return rows, form


def _is_whole(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError as error:
        return not isinstance(error, json.JSONDecodeError)
    except RecursionError:
        pass
    return True


def _documents(path: Path, text: str) -> tuple[list[Any], str]:
    """The values that stand one after another in a text; those of an array, if it is one."""
    values, at = [], 0
    decoder = json.JSONDecoder()
    spaces = re.compile(rf"[{string.whitespace}]*")
    while (at := spaces.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {error.lineno}: this is not JSON ({error.msg}, column "
                f"{error.colno}); each line must be one whole JSON object, or the file one array."
            ) from None
        except (ValueError, RecursionError):
            raise ValueError(_unreadable(str(path))) from None
        values.append(value)
    if len(values) == 1 and isinstance(values[0], list):
        return values[0], "a JSON array"
    return values, "JSON objects"


def json_type(value: object) -> str:
    """The JSON name of a parsed value's type, with its article."""
    return _JSON_TYPES.get(type(value), "a number")


def read_bytes(path: Path) -> bytes:
    """A file's content; ValueError if there is none."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}: check the path.")
    return path.read_bytes()


def texts_of(path: Path, content: bytes) -> Iterator[tuple[int, str]]:
    """What stands before each newline of a UTF-8 text, and the number of that line."""
    for number, raw in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        try:
            yield number, raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: byte {error.start + 1} of the line is not UTF-8; save the "
                f"file as UTF-8."
            ) from None


def _unreadable(where: str) -> str:
    return f"{where}: this JSON has a number too long or lists too deep to read; shorten it."


def _object(text: str, where: str) -> Fields:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if "\0" in text:
            raise ValueError(
                f"{where}: there are zero bytes in it, as a crash or a full disk leaves them: "
                "remove them, or write the file again."
            ) from None
        raise ValueError(
            f"{where}: this is not JSON ({error.msg}, column {error.colno}); each line must be "
            f"one whole JSON object."
        ) from None
    except (ValueError, RecursionError):
        raise ValueError(_unreadable(where)) from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: each line must be a JSON object, not {json_type(value)}.")
    return value
