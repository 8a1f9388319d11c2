"""What is compared: methods x tasks x seeds x learning rates, and the YAML file that says it.

    output_dir: runs/compare            # everything is written here
    launcher: [deepspeed, --num_gpus, 8] # before the program (default: [python])
    program: launch/train.py            # (default; where there is none, the module gem_ds.train)
    num_parallel: 1                     # runs at once
    devices: ["0", "1"]                 # one CUDA_VISIBLE_DEVICES for each of them
    common: {flag: value}               # flags of every run
    seeds: [42, 43, 44]
    dev_examples: 500                   # held out of the training data, to choose the learning rate
    choose_by: loss                     # of the held-out examples (default: score)
    learning_rates: [1e-3, 1e-2]        # of the methods that give none
    methods:
      gem: {learning_rates: [3e-3, 1e-2], flags: {flag: value}}
      gem_sam: {method: gem, flags: {sam_rho: 0.05}}   # under a name of its own; tasks likewise
    tasks:
      rte: {data_dir: folder, flags: {flag: value}, dev_examples: 200}  # all may be left out
      gsm8k:
        evaluate:                       # a second command, for what only generation can score
          command: python -m eval.gsm8k --model_name_or_path {model} {weights}
            --data_dir {data_dir} --output_dir {output_dir}/eval   # there is {seed}, too
          score: exact_match.strict-match.accuracy   # where eval/results.json has it
          correct: strict_match         # the field of eval/verdicts.jsonl that judges a sample
          metric: strict-match          # its name in the tables (default: score)

A flag of a task wins over one of ``common``, one of a method over both. A key without a value
counts as left out.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import yaml

from gem_ds.data.tasks import task_names
from gem_ds.train.methods import METHODS

#: Flags that a comparison sets itself, or leaves out for all runs alike.
OWN_FLAGS = (
    *("method", "task", "data_dir", "seed", "learning_rate", "output_dir", "overwrite_output_dir"),
    *("resume_from_checkpoint", "dev_examples", "evaluate_on"),
)

Flags = dict[str, Any]
T = TypeVar("T")

#: A key's value and its name -> the value as the comparison has it, or a ValueError.
Check = Callable[[Any, str], Any]


def _value(
    expected: str, is_good: Callable[[Any], Any], become: Callable[[Any], Any] = lambda value: value
) -> Check:
    def check(value: Any, where: str) -> Any:
        if not is_good(value):
            raise ValueError(f"{where} must be {expected}, not {value!r}.")
        return become(value)

    return check


def _is_rate(value: Any) -> bool:
    with suppress(ValueError):
        return 0 < float(str(value)) < math.inf  # YAML reads 1e-3 as text
    return False


_folder = _value(
    "a text of letters, digits, '_', '.' or '-', as it names a folder",
    lambda value: isinstance(value, str) and re.fullmatch(r"\w[\w.-]*", value),
)
_text = _value("a text", lambda value: isinstance(value, str) and value)
_path = _value("a path", lambda value: isinstance(value, str) and value, Path)
_count = _value("a whole number of at least 1", lambda value: type(value) is int and value >= 1)
_seed = _value("a whole number of at least 0", lambda value: type(value) is int and value >= 0)
_rate = _value("a number above 0", _is_rate, lambda value: float(str(value)))
_aim = _value("score or loss", lambda value: value in ("score", "loss"))


def _several(
    check: Check, *, repeated: bool = False, become: Callable[[Iterable[Any]], Any] = tuple
) -> Check:
    def check_all(value: Any, where: str) -> Any:
        if not isinstance(value, list) or not value:
            raise ValueError(f"{where} must be a list of at least one value.")
        values = [check(item, f"each of {where}") for item in value]
        for item in () if repeated else values:
            if values.count(item) > 1:
                raise ValueError(f"{where} has {item} more than once.")
        return become(values)

    return check_all


_rates = _several(_rate, become=lambda rates: tuple(sorted(rates)))
_words = _several(lambda value, where: str(value), repeated=True)


def _flags(value: Any, where: str) -> Flags:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must map flag names to values.")
    for name, setting in value.items():
        if not isinstance(name, str) or name.startswith("-"):
            raise ValueError(f"{where}: write flag names without dashes, not {name!r}.")
        if name in OWN_FLAGS:
            raise ValueError(f"leave {name} out of {where}: it is the comparison's own to set.")
        if isinstance(setting, dict):
            raise ValueError(f"{where}.{name} must be a value or a list of values.")
    return dict(value)


def _command(value: Any, where: str) -> tuple[str, ...]:
    text = _text(value, where)
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"{where} cannot be split into words: {error}.") from None
    for word in words:
        if "{weights}" in word and word != "{weights}":
            raise ValueError(f"{where}: {{weights}} must stand alone, not in {word!r}.")
    if not any("{output_dir}/eval" in word for word in words):
        raise ValueError(f"{where} must write to {{output_dir}}/eval: that is read.")
    return words


def _mapping(kind: type[T]) -> Check:
    """A mapping that becomes a dataclass: its fields are the keys, annotated with their checks."""

    def check(value: Any, where: str) -> T:
        checks = get_type_hints(kind, include_extras=True)
        given, prefix = {} if value is None else value, f"{where}." if where else ""
        if not isinstance(given, dict):
            raise ValueError(f"{where or 'the file'} must map names to values.")
        _refuse_unknown(given, where or "the file", "key", checks)
        found = {
            name: checks[name].__metadata__[0](setting, prefix + name)
            for name, setting in given.items()
            if setting is not None
        }
        for key in fields(kind):  # type: ignore[arg-type]
            if key.name not in found and key.default is MISSING is key.default_factory:
                raise ValueError(f"{prefix}{key.name} is missing.")
        return kind(**found)

    return check


def _named(kind: type[Any], word: str, known: Iterable[str]) -> Check:
    """What each name stands for is its key ``word``, or else the name itself."""

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            raise ValueError(f"{where} must map at least one name to its settings.")
        found = {name: _mapping(kind)(inner, f"{where}.{name}") for name, inner in value.items()}
        for name, inner in found.items():
            own = getattr(inner, word) or name
            _refuse_unknown([own], where if own is name else f"{where}.{name}", word, known)
            _folder(name, f"each name of {where}")
            found[name] = replace(inner, **{word: own})
        return found

    return check


def _refuse_unknown(names: Iterable[Any], where: str, word: str, known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            listed = ", ".join(sorted(known))
            raise ValueError(f"{where} has the unknown {word} {name!r}; known: {listed}.")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The second command of a run, and where its result stands in the files that it writes."""

    command: Annotated[tuple[str, ...], _command]
    score: Annotated[str, _text]
    correct: Annotated[str, _text]
    metric: Annotated[str | None, _text] = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method with the learning rates that it is given, ascending."""

    method: Annotated[str, _text] = ""  # (default: the row's name)
    learning_rates: Annotated[tuple[float, ...], _rates] = ()
    flags: Annotated[Flags, _flags] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task with its data; ``dev_examples`` where the comparison's number does not suit it."""

    task: Annotated[str, _text] = ""  # (default: its name here)
    data_dir: Annotated[str | None, _text] = None
    dev_examples: Annotated[int | None, _count] = None
    flags: Annotated[Flags, _flags] = field(default_factory=dict)
    evaluate: Annotated[Evaluation | None, _mapping(Evaluation)] = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that the file says; methods and tasks in its order."""

    output_dir: Annotated[Path, _path]
    methods: Annotated[dict[str, Method], _named(Method, "method", METHODS)]
    tasks: Annotated[dict[str, Task], _named(Task, "task", task_names())]
    seeds: Annotated[tuple[int, ...], _several(_seed)]
    dev_examples: Annotated[int, _count]
    choose_by: Annotated[Literal["score", "loss"], _aim] = "score"
    learning_rates: Annotated[tuple[float, ...], _rates] = ()
    common: Annotated[Flags, _flags] = field(default_factory=dict)
    launcher: Annotated[tuple[str, ...], _words] = ("python",)
    program: Annotated[str | None, _text] = None
    num_parallel: Annotated[int, _count] = 1
    devices: Annotated[tuple[str, ...] | None, _words] = None


def read_comparison(path: Path) -> Comparison:
    """Read and check the file of a comparison; ValueError names it and what to change in it."""
    try:
        return parse_comparison(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"--config {path} is not valid YAML: {text}.") from None
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None


def parse_comparison(content: object) -> Comparison:
    """The same of the file's content."""
    comparison: Comparison = _mapping(Comparison)(content, "")
    shared, methods = comparison.learning_rates, {}
    for name, method in comparison.methods.items():
        methods[name] = replace(method, learning_rates=method.learning_rates or shared)
        if not methods[name].learning_rates:
            raise ValueError(
                f"methods.{name} has no learning_rates: give them there or at the top."
            )
    if comparison.devices is not None and len(comparison.devices) < comparison.num_parallel:
        raise ValueError(
            f"devices must have an entry for each of the {comparison.num_parallel} runs that "
            f"num_parallel starts at once, not {len(comparison.devices)}."
        )
    for name, task in comparison.tasks.items():
        words = " ".join(task.evaluate.command) if task.evaluate else ""
        needs_model = "{model}" in words or "{weights}" in words
        if needs_model and "model_name_or_path" not in comparison.common | task.flags:
            raise ValueError(f"give model_name_or_path in common: tasks.{name}.evaluate needs it.")
    return replace(comparison, methods=methods)
