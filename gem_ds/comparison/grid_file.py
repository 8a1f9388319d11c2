"""What is compared: the YAML file of a comparison, read and checked.

    output_dir: runs/compare            # everything is written here
    launcher: [deepspeed, --num_gpus, 8] # before the program (default: [python])
    program: launch/train.py            # (default)
    num_parallel: 1                     # runs at once
    devices: ["0", "1"]                 # one CUDA_VISIBLE_DEVICES for each of them
    common: {flag: value}               # flags of every run
    seeds: [42, 43, 44]
    dev_examples: 500                   # held out of the training data, to choose the learning rate
    learning_rates: [1e-3, 1e-2]        # of the methods that give none
    methods:
      gem: {learning_rates: [3e-3, 1e-2], flags: {flag: value}}
    tasks:
      rte: {data_dir: folder, flags: {flag: value}, dev_examples: 200}  # all may be left out
      gsm8k:
        evaluate:                       # a second command, for what only generation can score
          command: python -m eval.gsm8k --model_name_or_path {model} {weights}
            --data_dir {data_dir} --output_dir {output_dir}/eval   # there is {seed}, too
          score: exact_match.strict-match.accuracy   # where eval/results.json has it
          correct: strict_match         # the field of eval/verdicts.jsonl that judges a sample
          metric: strict-match          # its name in the tables (default: score)

A flag of a task wins over one of ``common``, one of a method over both.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from gem_ds.comparison.grid import Comparison, Evaluation, Flags, Method, Task
from gem_ds.data.tasks import task_names
from gem_ds.select.methods import METHODS

#: Flags that a comparison sets itself, or leaves out for all runs alike.
OWN_FLAGS = (
    "method",
    "task",
    "data_dir",
    "seed",
    "learning_rate",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "dev_examples",
    "evaluate_on",
)


def read_comparison(path: Path) -> Comparison:
    """Read and check the file of a comparison.

    Raises:
        ValueError: one sentence that names the file and what to change in it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"--config {path} is not valid YAML: {text}.") from None
    try:
        return parse_comparison(content)
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None


def parse_comparison(content: object) -> Comparison:
    """The same for the file's content.

    Raises:
        ValueError: one sentence that names the key.
    """
    top = _mapping(content, "the file", Comparison.__annotations__.keys() | {"learning_rates"})
    for key in ("output_dir", "methods", "tasks", "seeds", "dev_examples"):
        if key not in top:
            raise ValueError(f"{key} is missing.")
    shared = top.get("learning_rates")
    comparison = Comparison(
        output_dir=Path(_text(top["output_dir"], "output_dir")),
        methods={
            name: _method(value, f"methods.{name}", shared)
            for name, value in _named(top["methods"], "methods", "method", METHODS).items()
        },
        tasks={
            name: _task(value, f"tasks.{name}")
            for name, value in _named(top["tasks"], "tasks", "task", task_names()).items()
        },
        seeds=_numbers(top["seeds"], "seeds", _seed),
        dev_examples=_count(top["dev_examples"], "dev_examples"),
        common=_flags(top.get("common"), "common"),
        launcher=_texts(top.get("launcher", ["python"]), "launcher"),
        program=_text(top.get("program", "launch/train.py"), "program"),
        num_parallel=_count(top.get("num_parallel", 1), "num_parallel"),
        devices=None if top.get("devices") is None else _texts(top["devices"], "devices"),
    )
    if comparison.devices is not None and len(comparison.devices) < comparison.num_parallel:
        raise ValueError(
            f"devices must have an entry for each of the {comparison.num_parallel} runs that "
            f"num_parallel starts at once, not {len(comparison.devices)}."
        )
    _check_models(comparison)
    return comparison


def _check_models(comparison: Comparison) -> None:
    """``{model}`` must be known wherever an evaluation asks for it."""
    for name, task in comparison.tasks.items():
        wanted = task.evaluate and any(
            "{model}" in word or "{weights}" in word for word in task.evaluate.command
        )
        if wanted and "model_name_or_path" not in comparison.common | task.flags:
            raise ValueError(f"give model_name_or_path in common: tasks.{name}.evaluate needs it.")


def _method(value: object, where: str, shared: object) -> Method:
    given = _mapping(value, where, Method.__annotations__)
    rates = given.get("learning_rates", shared)
    if rates is None:
        raise ValueError(f"{where} has no learning_rates: give them there or at the top.")
    return Method(
        learning_rates=tuple(sorted(_numbers(rates, f"learning_rates of {where}", _rate))),
        flags=_flags(given.get("flags"), f"{where}.flags"),
    )


def _task(value: object, where: str) -> Task:
    given = _mapping(value, where, Task.__annotations__)
    evaluate, data_dir = given.get("evaluate"), given.get("data_dir")
    dev_examples = given.get("dev_examples")
    return Task(
        data_dir=None if data_dir is None else _text(data_dir, f"{where}.data_dir"),
        dev_examples=None
        if dev_examples is None
        else _count(dev_examples, f"{where}.dev_examples"),
        flags=_flags(given.get("flags"), f"{where}.flags"),
        evaluate=None if evaluate is None else _evaluation(evaluate, f"{where}.evaluate"),
    )


def _evaluation(value: object, where: str) -> Evaluation:
    given = _mapping(value, where, Evaluation.__annotations__)
    for key in ("command", "score", "correct"):
        if key not in given:
            raise ValueError(f"{where}.{key} is missing.")
    texts = {key: _text(text, f"{where}.{key}") for key, text in given.items()}
    try:
        command = shlex.split(texts["command"])
    except ValueError as error:
        raise ValueError(f"{where}.command cannot be split into words: {error}.") from None
    for word in command:
        if "{weights}" in word and word != "{weights}":
            raise ValueError(f"{where}.command: {{weights}} must stand alone, not in {word!r}.")
    if not any("{output_dir}/eval" in word for word in command):
        raise ValueError(f"{where}.command must write to {{output_dir}}/eval: that is read.")
    texts.pop("command")
    return Evaluation(command=tuple(command), **{"metric": texts["score"], **texts})


def _mapping(value: object, where: str, known: Collection[str]) -> Mapping[str, Any]:
    """A mapping without unknown keys; nothing at all is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where} must map names to values.")
    _refuse_unknown(value, where, "key", known)
    return value


def _named(value: object, where: str, kind: str, known: Collection[str]) -> Mapping[str, Any]:
    """A mapping of known methods or tasks to their settings."""
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{where} must map at least one name to its settings.")
    _refuse_unknown(value, where, kind, known)
    return value


def _refuse_unknown(names: Iterable[object], where: str, kind: str, known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            listed = ", ".join(sorted(known))
            raise ValueError(f"{where} has the unknown {kind} {name!r}; known: {listed}.")


def _flags(value: object, where: str) -> Flags:
    if value is None:
        return {}
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


def _numbers(value: object, where: str, convert: Any) -> tuple[Any, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be a list of at least one value.")
    numbers = tuple(convert(item, where) for item in value)
    for number in numbers:
        if numbers.count(number) > 1:
            raise ValueError(f"{where} has {number} more than once.")
    return numbers


def _rate(value: object, where: str) -> float:
    """A learning rate; YAML reads 1e-3 as text."""
    try:
        rate = float(str(value))
    except ValueError:
        rate = math.nan
    if isinstance(value, bool) or not 0 < rate < math.inf:
        raise ValueError(f"{where} must be numbers above 0, not {value!r}.")
    return rate


def _seed(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{where} must be whole numbers of at least 0, not {value!r}.")
    return value


def _count(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where} must be a whole number of at least 1, not {value!r}.")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} must be a text, not {value!r}.")
    return value


def _texts(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be a list of at least one word.")
    return tuple(str(item) for item in value)
