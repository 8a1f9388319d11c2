"""The command line of launch/train.py: flags, and a recipe that gives their defaults."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import yaml
from transformers import HfArgumentParser

from gem_ds.train.config import (
    DataArguments,
    MethodArguments,
    ModelArguments,
    TrainArguments,
    check_arguments,
    default_learning_rate,
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Everything that the user said."""

    model: ModelArguments
    data: DataArguments
    method: MethodArguments
    train: TrainArguments


def parse_arguments(
    argv: Sequence[str], needed: Sequence[str] = ("model_name_or_path", "task", "output_dir")
) -> Arguments:
    """Read flags, on top of the recipe that ``--config`` names.

    Args:
        argv: the flags.
        needed: names of those that must be there.

    Raises:
        ValueError: the recipe, a flag or a value is wrong; the sentence names it.
        SystemExit: ``--help`` was asked for.
    """
    parser = _Parser(
        (ModelArguments, DataArguments, MethodArguments, TrainArguments),  # type: ignore[arg-type]
        prog="launch/train.py",
        description="Fine-tune a language model with GEM on DeepSpeed.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="YAML file of flags; flags win.")
    recipe = parser.parse_known_args(argv)[0].config
    if recipe:
        parser.set_defaults(**_read_recipe(Path(recipe), parser))
    model, data, method, train, _, unknown = parser.parse_args_into_dataclasses(
        list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"There is no flag {unknown[0]}: see --help.")
    values = vars(model) | vars(data) | vars(train)
    if missing := [f"--{name}" for name in needed if not values[name]]:
        raise ValueError(f"Pass {' and '.join(missing)} (on the command line or in --config).")
    check_arguments(model, data, method, train)
    if train.learning_rate is None:
        train = replace(train, learning_rate=default_learning_rate(method.method))
    return Arguments(model=model, data=data, method=method, train=train)


class _Parser(HfArgumentParser):
    """Raises what argparse would print before it leaves the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].upper()}{message[1:]}: see --help.")


def _read_recipe(path: Path, parser: argparse.ArgumentParser) -> dict[str, object]:
    """The recipe's values, each converted and checked as the flag would be."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--config {path} is not valid YAML: {' '.join(str(error).split())}."
        ) from None
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path} must map flag names to values.")
    actions = {action.dest: action for action in parser._actions}
    values: dict[str, object] = {}
    for key, value in recipe.items():
        if key not in actions or key in ("config", "help"):
            raise ValueError(f"--config {path}: there is no flag --{key}.")
        values[key] = _convert(path, actions[key], value)
    return values


def _convert(path: Path, action: argparse.Action, value: object) -> object:
    """One value of the recipe as its flag would give it; YAML reads 1e-3 as text, for instance."""
    if value is None and action.default is None:
        return None
    if action.nargs == "+":
        return [str(item) for item in value] if isinstance(value, list) else [str(value)]
    convert = action.type if callable(action.type) else str
    try:
        if value is None or isinstance(value, (list, dict)):
            raise ValueError
        converted = convert(str(value))
        if action.choices is not None and converted not in action.choices:
            raise ValueError
        return converted
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        choices = f": pass one of {', '.join(action.choices)}" if action.choices else ""
        raise ValueError(f"--config {path}: {action.dest} cannot be {value!r}{choices}.") from None
