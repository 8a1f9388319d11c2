r"""JSON objects with the place where they stand, and the task made of the user's own JSONL files.

A line of such a file is a JSON object. With `prompt_field` and `target_field`, those two strings
are the prompt and the target exactly as they stand: nothing is added between them, so a separating
space or newline must be in the data. Without them a line must have the chat form

    {"messages": [{"role": "user", "content": ...}, ..., {"role": "assistant", "content": ...}]}

whose last message is the target and whose earlier messages are the prompt.
"""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass, replace
from pathlib import Path

from gem_ds.data.tasks import Example, Source, TaskData


def load(source: Source) -> TaskData:
    """Load the user's own training file and, where there is one, held-out file.

    Args:
        source: `data_dir` is a folder with `train.jsonl` and perhaps `test.jsonl`, or is itself the
            training file. `train_file` and `test_file` name other files, within the folder if there
            is one. `prompt_field` and `target_field` say which fields to read.

    Raises:
        ValueError: Nothing says where the data are, only one of the two fields is given, or a file
            is at fault.
    """
    if (source.prompt_field is None) != (source.target_field is None):
        raise ValueError("Pass both --prompt_field and --target_field, or neither for chat files.")
    train, test = _files(source)
    return TaskData(train=_read(train, source), test=[] if test is None else _read(test, source))


def _files(source: Source) -> tuple[Path, Path | None]:
    """The training file and the held-out file, the latter None where there is none."""
    if source.data_dir is None and source.train_file is None:
        raise ValueError(
            "--task jsonl needs --data_dir: pass a folder with train.jsonl, or one file."
        )
    folder = Path(source.data_dir or "")
    if folder.is_file():
        if source.train_file is not None:
            raise ValueError(
                f"Both --data_dir {folder} and --train_file {source.train_file} name a training "
                f"file: pass one of them."
            )
        return folder, None if source.test_file is None else Path(source.test_file)
    if source.test_file is not None:
        test = folder / source.test_file
    elif source.data_dir is not None and (folder / "test.jsonl").is_file():
        test = folder / "test.jsonl"
    else:
        test = None
    return folder / (source.train_file or "train.jsonl"), test


def _read(path: Path, source: Source) -> list[Example]:
    return [_example(line, source.prompt_field, source.target_field) for line in read_jsonl(path)]


def _example(line: Line, prompt_field: str | None, target_field: str | None) -> Example:
    if prompt_field is not None and target_field is not None:
        return Example(prompt=line.text(prompt_field), target=line.text(target_field))
    if "messages" not in line.fields:
        raise line.error(
            f"there is no field 'messages': pass --prompt_field and --target_field, each one of "
            f"{line.field_names()}."
        )
    messages = _messages(line)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise line.error(
            "'messages' must end with the assistant message to learn and have at least one message "
            "before it."
        )
    return Example(prompt=messages[:-1], target=messages[-1]["content"])


def _messages(line: Line) -> list[dict[str, str]]:
    """The chat messages of a line, each reduced to its role and content."""
    value = line.fields["messages"]
    if not isinstance(value, list):
        raise line.error(f"the field 'messages' must be a list, not {json_type(value)}.")
    messages = []
    for number, message in enumerate(value, start=1):
        if not (isinstance(message, dict) and {"role", "content"} <= message.keys()):
            raise line.error(f"message {number} must be an object with 'role' and 'content'.")
        messages.append(
            {
                key: line.checked_text(message[key], f"{key!r} of message {number}")
                for key in ("role", "content")
            }
        )
    return messages


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


def read_bytes(path: Path) -> bytes:
    """The content of a file; ValueError if there is none."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}: check the path.")
    return path.read_bytes()


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


def read_jsonl(path: Path) -> list[Line]:
    r"""Read every line of a UTF-8 JSONL file as one JSON object; blank lines are skipped.

    Lines end in `\n` or `\r\n` only: U+2028 and its like may stand inside strings. A byte-order
    mark at the start is accepted.

    Raises:
        ValueError: The file is missing or holds no object, or a line is not UTF-8, not JSON or not
            an object; the sentence names the file and the line.
    """
    lines = parse_jsonl(path, read_bytes(path))
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
