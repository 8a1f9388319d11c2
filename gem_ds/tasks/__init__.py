"""Task families: where examples come from, and how each becomes a prompt and a target.

A family is one file with a `load(source) -> TaskData`; `load_task` finds it by name. What a family
returns is text. Tokens are `gem_ds.encode`, batches `gem_ds.data`; scoring of answers is `eval`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


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
class ChoiceExample(Example):
    """A case whose answer is one of several: `target` is `candidates[answer]`.

    Attributes:
        candidates: Texts that may follow the prompt, as `target` does.
        answer: Index of the right one.
        pairs: What an encoder reads: one sentence pair where the task has a fixed set of labels,
            one for each candidate where the candidates are the example's own.
        group: What examples are judged together (a passage's question), for metrics that need it.
        answers: Every text that counts as right, for metrics that need it.
    """

    candidates: tuple[str, ...]
    answer: int
    pairs: tuple[tuple[str, str | None], ...]
    group: str = ""
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NumberExample(Example):
    """A case whose answer is a number: `value`, which `target` writes out; one sentence pair."""

    pairs: tuple[tuple[str, str | None], ...]
    value: float


Kind = Literal["text", "labels", "choices", "number"]
"""What an answer is: text, one of the task's labels, one of the example's choices, or a number."""


@dataclass(frozen=True)
class TaskData:
    """The examples of a task: `train`, and `test` which is held out and may be empty.

    Attributes:
        train: What is learnt from.
        test: What is measured on.
        kind: What an answer is; "labels" and "choices" hold `ChoiceExample`, "number" holds
            `NumberExample`.
        labels: Names of the labels, in the order of `candidates`; empty for other kinds.
    """

    train: list[Example]
    test: list[Example]
    kind: Kind = "text"
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the user said about where the examples are; None means the family's own default."""

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


def load_task(
    name: str,
    *,
    data_dir: str | None = None,
    train_file: str | None = None,
    test_file: str | None = None,
    prompt_field: str | None = None,
    target_field: str | None = None,
) -> TaskData:
    """Load the examples of the task `name`.

    Args:
        name: A task family, for instance "gsm8k", "mbpp" or "jsonl".
        data_dir: Folder that holds the task's files; None loads the task from the Hub, where the
            family knows its address.
        train_file: Training file, for families that read the user's own files.
        test_file: Held-out file, likewise.
        prompt_field: JSON field that holds the prompt, likewise.
        target_field: JSON field that holds the target, likewise.

    Raises:
        ValueError: No such task, an option which the task does not take, or a file at fault (the
            sentence names the file and the line).
    """
    from gem_ds.tasks import gsm8k, jsonl, mbpp  # here, as each family imports the classes above

    loaders: dict[str, Callable[[Source], TaskData]] = {
        "gsm8k": gsm8k.load,
        "jsonl": jsonl.load,
        "mbpp": mbpp.load,
    }
    if name not in loaders:
        raise ValueError(f"There is no task {name!r}: pass one of {', '.join(sorted(loaders))}.")
    return loaders[name](
        Source(
            data_dir=data_dir,
            train_file=train_file,
            test_file=test_file,
            prompt_field=prompt_field,
            target_field=target_field,
        )
    )
