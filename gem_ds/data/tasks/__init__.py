"""Task families: where examples come from, and how each becomes a prompt and a target.

A family is one file with a `load(source) -> TaskData`; `load_task` finds it by name. The tasks of
GLUE and SuperGLUE are one family: a table, `data.tasks.catalog`. What a family returns is text.
Tokens are `gem_ds.data.encode`, batches `gem_ds.data.batches`; scoring of answers is `eval`.

    kind      examples          the answer is
    text      Example           written freely (squad: AnswerExample, judged by several references;
                                ChatExample, turns of a conversation; PlainText, all of a text)
    labels    ChoiceExample     one of the task's fixed set of labels
    choices   ChoiceExample     one of the example's own candidates
    number    NumberExample     a number
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

Kind = Literal["text", "labels", "choices", "number"]

#: `{"role": ..., "content": ...}`, and what else a chat template reads: `tool_calls`, ...
Message = dict[str, Any]

#: What a causal model reads: text, or messages, which the tokenizer's template turns into text.
Prompt = str | list[Message]

#: What an encoder reads: a sentence, or two with its separator between them.
Pair = tuple[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training or test case: the model reads `prompt` and learns to write `target`."""

    prompt: Prompt
    target: str  # as it stands behind the prompt: a space between the two belongs to it
    place: str = field(default="", compare=False)  # the file and line, for errors


@dataclass(frozen=True, kw_only=True)
class ChatExample(Example):
    """A conversation: `prompt` is read, and of the `turns` behind it the assistant's are learnt."""

    turns: list[Message]  # the first and the last are the assistant's
    tools: list[dict[str, Any]] | None = None  # JSON schemas of what it may call
    target: str = ""  # none that is text without a template


@dataclass(frozen=True, kw_only=True)
class PlainText(Example):
    """A text all of which is learnt, but for its first token where nothing precedes that."""

    prompt: Prompt = ""


@dataclass(frozen=True, kw_only=True)
class AnswerExample(Example):
    """An example whose answer is free text; `target` is the first of several that are accepted."""

    answers: tuple[str, ...]  # every accepted text, without the space that `target` starts with
    passage: str  # what the question is about; several questions may share one


@dataclass(frozen=True, kw_only=True)
class NumberExample(Example):
    """An example whose answer is a number; `target` writes it with one decimal."""

    pairs: tuple[Pair, ...]  # one: what an encoder reads to regress the number
    value: float  # as exact as the dataset has it


@dataclass(frozen=True, kw_only=True)
class ChoiceExample(Example):
    """An example whose answer is one of several candidates: `target == candidates[answer]`."""

    candidates: tuple[str, ...]  # texts that may follow the prompt, leading space included
    answer: int  # which of them is right, from 0
    #: For encoders: one where the task has a fixed set of labels, else one for each candidate.
    pairs: tuple[Pair, ...]
    group: str = ""  # examples of one group are judged together (multirc: one question's)
    answers: tuple[str, ...] = ()  # record: every accepted text, `target` without its space too


@dataclass(frozen=True)
class TaskData:
    """The examples of a task.

    `test` is held out and may be empty. Where a benchmark keeps the labels of its test set to
    itself, it is the validation set.
    """

    train: list[Example]
    test: list[Example]
    kind: Kind = "text"  # says the class of the examples
    labels: tuple[str, ...] = ()  # of kind "labels", in the dataset's order: `answer` counts them
    #: Whether several examples may be about one text.
    has_passages: bool = field(default=False, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)  # how the user's own files were read


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the user said about where the examples are; None means the family's own default.

    Without `data_dir` a task is loaded from the Hub. The others are for families that read the
    user's own data: which, the fields that hold prompt and target, and which of a conversation's
    answers are learnt, `all` (the default) or the `last`.
    """

    data_dir: str | None = None
    train_file: str | None = None
    test_file: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    prompt_field: str | None = None
    target_field: str | None = None
    train_on: str | None = None


def load_task(name: str, **said: str | None) -> TaskData:
    """Load the examples of a task of `task_names`; `said` is where they are, as `Source` has it.

    Raises:
        ValueError: No such task, an option which the task does not take, or a file at fault (the
            sentence names the file and the line).
    """
    families = _families()
    if name not in families:
        raise ValueError(f"There is no task {name!r}: pass one of {', '.join(task_names())}.")
    load, hub = families[name]
    for option, value in said.items():
        if hub is not None and option != "data_dir" and value is not None:
            raise ValueError(
                f"--{option} has no meaning for --task {name}, whose files and fields are fixed: "
                f"leave it out, or pass --task jsonl."
            )
    return load(Source(**said))


def task_names() -> list[str]:
    """Every task that :func:`load_task` knows, sorted."""
    return sorted(_families())


def hub_dataset(name: str) -> str | None:
    """Where the Hub has the task `name`; None for the user's own files."""
    return _families()[name][1]


def _families() -> dict[str, tuple[Callable[[Source], TaskData], str | None]]:
    """How each task is loaded, and its address on the Hub if it has one.

    Imports here, as each family imports the classes above.
    """
    from gem_ds.data.tasks import catalog, classification, gsm8k, jsonl, mbpp, squad

    return {
        "gsm8k": (gsm8k.load, gsm8k.HUB_DATASET),
        "jsonl": (jsonl.load, None),
        "mbpp": (mbpp.load, mbpp.HUB_DATASET),
        "squad": (squad.load, squad.HUB_DATASET),
        **{
            name: (partial(classification.load, task), task.hub[0])
            for name, task in catalog.TASKS.items()
        },
    }
