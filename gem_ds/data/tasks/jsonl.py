"""The user's own JSONL files, an example on each line.

With `prompt_field` and `target_field`, those two strings are the prompt and the target exactly as
they stand: nothing is added between them, so a separating space or newline must be in the data.
Without them a line must have the chat form

    {"messages": [{"role": "user", "content": ...}, ..., {"role": "assistant", "content": ...}]}

whose last message is the target and whose earlier messages are the prompt.
"""

from __future__ import annotations

from pathlib import Path

from gem_ds.data.tasks import Example, Source, TaskData
from gem_ds.data.tasks.lines import Line, json_type, read_jsonl


def load(source: Source) -> TaskData:
    """Load the training file and, where there is one, the held-out file.

    `data_dir` is a folder with `train.jsonl` and perhaps `test.jsonl`, or is itself the training
    file. `train_file` and `test_file` name other files, within the folder if there is one.
    """
    if (source.prompt_field is None) != (source.target_field is None):
        raise ValueError("Pass both --prompt_field and --target_field, or neither for chat files.")
    train, test = (
        [] if path is None else [_example(line, source) for line in read_jsonl(path)]
        for path in _files(source)
    )
    return TaskData(train=train, test=test)


def _files(source: Source) -> tuple[Path, Path | None]:
    """The training file, and the held-out file if there is one."""
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
    train = folder / (source.train_file or "train.jsonl")
    if source.test_file is not None:
        return train, folder / source.test_file
    test = folder / "test.jsonl"
    return train, test if source.data_dir is not None and test.is_file() else None


def _example(line: Line, source: Source) -> Example:
    if source.prompt_field is not None and source.target_field is not None:
        return Example(prompt=line.text(source.prompt_field), target=line.text(source.target_field))
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
