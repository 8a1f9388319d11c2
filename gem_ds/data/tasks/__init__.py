"""Task families: where examples come from, and how each becomes a prompt and a target.

A family is one file with a `load(source) -> TaskData`; `load_task` finds it by name. The tasks of
GLUE and SuperGLUE are one family: a table, `data.tasks.catalog`. What a family returns is text.
Tokens are `gem_ds.data.encode`, batches `gem_ds.data.batches`; scoring of answers is `eval`.

    kind      examples          the answer is
    text      Example           written freely (squad: AnswerExample, judged by several references)
    labels    ChoiceExample     one of the task's fixed set of labels
    choices   ChoiceExample     one of the example's own candidates
    number    NumberExample     a number
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

Kind = Literal["text", "labels", "choices", "number"]

#: What an encoder reads: a sentence, or two with its separator between them.
Pair = tuple[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training or test case: the model reads `prompt` and learns to write `target`.

    `prompt` is text, or chat messages `{"role": ..., "content": ...}` which the tokenizer's chat
    template turns into text. `target` follows the prompt exactly as it stands: a space between the
    two belongs to the target.
    """

    prompt: str | list[dict[str, str]]
    target: str


@dataclass(frozen=True, kw_only=True)
class AnswerExample(Example):
    """An example whose answer is free text; `target` is the first of several that are accepted.

    Attributes:
        answers: Every accepted text, without the space that `target` starts with.
        passage: What the question is about; several questions may share one.
    """

    answers: tuple[str, ...]
    passage: str


@dataclass(frozen=True, kw_only=True)
class NumberExample(Example):
    """An example whose answer is a number; `target` writes it with one decimal.

    Attributes:
        pairs: One: what an encoder reads to regress the number.
        value: The number, as exact as the dataset has it.
    """

    pairs: tuple[Pair, ...]
    value: float


@dataclass(frozen=True, kw_only=True)
class ChoiceExample(Example):
    """An example whose answer is one of several candidates: `target == candidates[answer]`.

    Attributes:
        candidates: Texts that may follow the prompt, as `target` does, leading space included.
        answer: Which of them is right, from 0.
        pairs: For encoders, the sentence or two to read: one where the task has a fixed set of
            labels, and one per candidate where the candidates are the example's own.
        group: Examples of the same group are judged together (multirc: one question's).
        answers: record: every accepted text, `target` without its space among them.
    """

    candidates: tuple[str, ...]
    answer: int
    pairs: tuple[Pair, ...]
    group: str = ""
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskData:
    """The examples of a task.

    Attributes:
        train: What to learn from.
        test: Held out; may be empty. Where a benchmark keeps the labels of its test set to itself,
            this is its validation set.
        kind: What an answer is; says the class of the examples.
        labels: For kind "labels" their names, in the order of the dataset: `answer` counts them.
    """

    train: list[Example]
    test: list[Example]
    kind: Kind = "text"
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the user said about where the examples are; None means the family's own default.

    Attributes:
        data_dir: Folder that holds the task's files; None loads the task from the Hub, where the
            family knows its address.
        train_file: Training file, for families that read the user's own files.
        test_file: Held-out file, likewise.
        prompt_field: JSON field that holds the prompt, likewise.
        target_field: JSON field that holds the target, likewise.
    """

    data_dir: str | None = None
    train_file: str | None = None
    test_file: str | None = None
    prompt_field: str | None = None
    target_field: str | None = None

    def refuse_own_fields(self, task: str) -> None:
        """Raise ValueError if file or field names are given to a family that fixes its own."""
        for option in ("train_file", "test_file", "prompt_field", "target_field"):
            if getattr(self, option) is not None:
                raise ValueError(
                    f"--{option} has no meaning for --task {task}, whose files and fields are "
                    f"fixed: leave it out, or pass --task jsonl."
                )


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a task is loaded, and its address on the Hub if it has one."""

    load: Callable[[Source], TaskData]
    hub: str | None = None


def load_task(name: str, **said: str | None) -> TaskData:
    """Load the examples of the task `name`, for instance "gsm8k", "rte" or "jsonl".

    Args:
        name: One of `task_names`.
        said: Where they are, as `Source` has it.

    Raises:
        ValueError: No such task, an option which the task does not take, or a file at fault (the
            sentence names the file and the line).
    """
    families = _families()
    if name not in families:
        raise ValueError(f"There is no task {name!r}: pass one of {', '.join(task_names())}.")
    return families[name].load(Source(**said))


def task_names() -> list[str]:
    """Every task that :func:`load_task` knows, sorted."""
    return sorted(_families())


def hub_dataset(name: str) -> str | None:
    """Where the Hub has the task `name`; None for the user's own files."""
    return _families()[name].hub


def _families() -> dict[str, Family]:
    """Every task by name; imports here, as each family imports the classes above."""
    from gem_ds.data.tasks import catalog, classification, gsm8k, jsonl, mbpp, squad

    return {
        "gsm8k": Family(load=gsm8k.load, hub=gsm8k.HUB_DATASET),
        "jsonl": Family(load=jsonl.load),
        "mbpp": Family(load=mbpp.load, hub=mbpp.HUB_DATASET),
        "squad": Family(load=squad.load, hub=squad.HUB_DATASET),
        **{
            name: Family(load=partial(classification.load, name, task), hub=task.hub[0])
            for name, task in catalog.TASKS.items()
        },
    }
