"""The task made of the user's own JSONL files.

A line is a JSON object. With `prompt_field` and `target_field`, those two strings are the prompt
and the target exactly as they stand: nothing is added between them, so a separating space or
newline must be in the data. Without them a line must have the chat form

    {"messages": [{"role": "user", "content": ...}, ..., {"role": "assistant", "content": ...}]}

whose last message is the target and whose earlier messages are the prompt.
"""

from __future__ import annotations

from pathlib import Path

from gem_ds.data.tasks import Example, Source, TaskData
from gem_ds.data.tasks.lines import Line, json_type, read_jsonl


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
