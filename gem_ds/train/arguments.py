"""How the flags of a training are read and checked: of a command line, on top of a recipe."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from numbers import Number
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from gem_ds.flags import HelpFormatter, name_of
from gem_ds.select.rules import SPARSE_METHODS
from gem_ds.train.config import (
    DEFAULT_LEARNING_RATE,
    DEFAULT_LEARNING_RATE_OF_FULL,
    Arguments,
    DataArguments,
    Limit,
    MethodArguments,
    ModelArguments,
    TrainArguments,
)
from gem_ds.train.methods import DENSE_METHODS

_NEEDED = ("model_name_or_path", "task", "output_dir")


def parse_arguments(argv: Sequence[str], needed: Sequence[str] = _NEEDED) -> Arguments:
    """Read flags, on top of the recipe that ``--config`` names; those of ``needed`` must be there.

    What is wrong is a ValueError, ``--help`` a SystemExit.
    """
    parser = _Parser(
        (ModelArguments, DataArguments, MethodArguments, TrainArguments),  # type: ignore[arg-type]
        prog=name_of("train"),
        description="Fine-tune a language model with GEM on DeepSpeed.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="YAML file of flags; flags win.")
    if recipe := parser.parse_known_args(argv)[0].config:
        parser.set_defaults(**_converted(_read_recipe(recipe), parser, f"--config {recipe}: "))
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
        is_full = method.method == "full"
        rate = DEFAULT_LEARNING_RATE_OF_FULL if is_full else DEFAULT_LEARNING_RATE
        train = replace(train, learning_rate=rate)
    return replace(args, train=train)


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Values by the names of their flags, as a command line; None leaves a flag out."""
    flags = []
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            if not isinstance(value, (str, Number, os.PathLike)):  # truth values are numbers
                raise ValueError(f"{name} cannot be a {type(value).__name__}: see --help.")
            flags.append(f"--{name}={value}")  # in one word, which may begin with a minus
    return flags


def check_arguments(args: Arguments) -> None:
    """Refuse what can be seen to be wrong without opening a file."""
    for name, limit in _limits():
        value = args.values()[name]
        if value is not None and not limit.holds(value):
            raise ValueError(f"--{name} must be {limit.words}, not {value}.")
    if (sentence := next(_contradictions(args), None)) is not None:
        raise ValueError(sentence)


def _limits() -> Iterator[tuple[str, Limit]]:
    """The limits in the types of the flags, optional ones too, by the flags' names."""
    for part in (ModelArguments, DataArguments, MethodArguments, TrainArguments):
        for name, hint in get_type_hints(part, include_extras=True).items():
            for kind in (hint, *get_args(hint)):
                yield from ((name, limit) for limit in get_args(kind) if isinstance(limit, Limit))


def _contradictions(args: Arguments) -> Iterator[str]:
    """A sentence for each thing that is wrong with the flags together."""
    data, method, train, name = args.data, args.method, args.train, args.method.method
    if train.bf16 and train.fp16:
        yield "Pass --bf16 or --fp16, not both."
    if train.max_steps == -1 and not 0 < train.num_train_epochs < inf:
        yield f"--num_train_epochs must be above 0, not {train.num_train_epochs}."
    if train.eval_steps is not None and (strategy := train.eval_strategy) in ("no", "epoch"):
        yield f"--eval_strategy {strategy} has no steps between: leave --eval_steps out."
    if data.evaluate_on == "dev" and not data.dev_examples:
        yield "--evaluate_on dev needs a development set: pass --dev_examples."
    for flag in ("calibration_examples", "calibration_head_steps", "calibration_buffer_gb"):
        if method.mask and getattr(method, flag):
            yield f"--mask skips calibration: leave --{flag} out."
    if train.optimizer == "adamw_8bit" and name != "full":
        yield "--optimizer adamw_8bit is for --method full: the others have little state."
    if name in SPARSE_METHODS:
        return
    if method.mask is not None:
        yield f"--method {name} selects no entries: leave --mask out."
    if name in DENSE_METHODS and method.target_modules:
        yield f"--method {name} has no target layers: leave --target_modules out."
    if method.sddmm_kernel != "auto":
        yield f"--method {name} selects no entries: leave --sddmm_kernel out."
    if train.max_steps == 0:
        yield f"--max_steps 0 writes a mask, and --method {name} has none."
    for flag in ("save_steps", "resume_from_checkpoint"):
        if getattr(train, flag) is not None:
            yield f"--method {name} writes no checkpoints: leave --{flag} out."


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


def _converted(recipe: dict[str, Any], parser: _Parser, where: str) -> dict[str, object]:
    """The recipe's values, each converted and checked as its flag would be."""
    actions = {action.dest: action for action in parser._actions}
    for name in recipe:
        if name not in actions or name in ("config", "help"):
            raise ValueError(f"{where}there is no flag --{name}.")
    return {name: _convert(actions[name], value, where) for name, value in recipe.items()}


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
