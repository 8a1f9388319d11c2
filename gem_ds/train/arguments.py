"""How the flags of a training are read: a command line or keyword values, on top of a recipe."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Number
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from gem_ds.flags import HelpFormatter
from gem_ds.train.config import (
    Arguments,
    DataArguments,
    MethodArguments,
    ModelArguments,
    TrainArguments,
    check_arguments,
    default_learning_rate,
)

_NEEDED = ("model_name_or_path", "task", "output_dir")


def parse_arguments(argv: Sequence[str], needed: Sequence[str] = _NEEDED) -> Arguments:
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
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="YAML file of flags; flags win.")
    if recipe := parser.parse_known_args(argv)[0].config:
        parser.set_defaults(**_convert_all(_read_recipe(recipe), parser, f"--config {recipe}: "))
    model, data, method, train, _, unknown = parser.parse_args_into_dataclasses(
        list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        name = unknown[0].partition("=")[0]
        raise ValueError(f"There is no flag {name}: see --help.")
    args = Arguments(model=model, data=data, method=method, train=train)
    if missing := [f"--{name}" for name in needed if not args.values()[name]]:
        raise ValueError(f"Pass {' and '.join(missing)} (on the command line or in --config).")
    check_arguments(args)
    if train.learning_rate is None:
        train = replace(train, learning_rate=default_learning_rate(method.method))
    return replace(args, train=train)


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Values by the names of their flags, as a command line; None leaves a flag out.

    Raises:
        ValueError: a value is of a kind that no flag takes, such as a mask in memory.
    """
    flags = []
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            if not isinstance(value, (str, Number, os.PathLike)):  # truth values are numbers
                remedy = "save it and pass the file's path" if name == "mask" else "see --help"
                raise ValueError(f"{name} cannot be a {type(value).__name__}: {remedy}.")
            flags.append(f"--{name}={value}")  # in one word, which may begin with a minus
    return flags


class _Parser(HfArgumentParser):
    """Raises what argparse would print before it leaves the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].upper()}{message[1:]}: see --help.")


def _read_recipe(path: str) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--config {path} is not valid YAML: {' '.join(str(error).split())}."
        ) from None
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path} must map flag names to values.")
    return recipe


def _convert_all(
    values: Mapping[str, Any], parser: argparse.ArgumentParser, where: str
) -> dict[str, object]:
    """Values by name, each converted and checked as its flag would be."""
    actions = {action.dest: action for action in parser._actions}
    for name in values:
        if name not in actions or name in ("config", "help"):
            raise ValueError(f"{where}there is no flag --{name}.")
    return {name: _convert(actions[name], value, where) for name, value in values.items()}


def _convert(action: argparse.Action, value: object, where: str) -> object:
    """One value as its flag would give it; YAML reads 1e-3 as text, for instance."""
    if value is None and action.default is None:
        return None
    if action.nargs == "+" and value is not None:
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
        raise ValueError(f"{where}{action.dest} cannot be {value!r}{choices}.") from None
