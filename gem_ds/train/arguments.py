"""How the flags of a training are read and checked: of a command line, on top of a recipe."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from math import inf
from numbers import Number
from typing import Any, NoReturn, get_args, get_type_hints

from transformers import HfArgumentParser

from gem_ds.flags import parser_of
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
from gem_ds.train.other_trainers import MEANINGS, RENAMED, told, translate
from gem_ds.train.recipe import converted, read_recipe

_PARTS = (ModelArguments, DataArguments, MethodArguments, TrainArguments)
_NEEDED = ("model_name_or_path", "task", "output_dir")


def parse_arguments(argv: Sequence[str], needed: Sequence[str] = _NEEDED) -> Arguments:
    """Read flags, on top of the recipe that ``--config`` names; those of ``needed`` must be there.

    Flags of other trainers are read as :mod:`gem_ds.train.other_trainers` understands them. What is
    wrong is a ValueError, ``--help`` a SystemExit.
    """
    parser = parser_of("train", "Fine-tune a language model with GEM on DeepSpeed.", *_PARTS)
    parser.error = _raise  # type: ignore[method-assign]
    parser.add_argument("--config", metavar="RECIPE.yaml", help="YAML file of flags; flags win.")
    flags, left_out = translate(_said(argv))
    _refuse_unknown(flags, parser)
    words = [word for name, value in flags.items() for word in _as_words(name, value)]
    if path := parser.parse_known_args(words)[0].config:
        given = [(key, value) for key, value in read_recipe(path).items() if value is not None]
        recipe, left_out_there = translate(given)
        left_out += left_out_there
        _refuse_unknown(recipe, parser, f"--config {path}: ")
        actions = {action.dest: action for action in parser._actions}
        for name, value in recipe.items():
            parser.set_defaults(**{name: converted(actions[name], value, f"--config {path}: ")})
    model, data, method, train, _, strays = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if strays:
        raise ValueError(f"There is no flag {strays[0]}: see --help.")
    if data.task is None and (data.train_file or data.dataset_name):
        data = replace(data, task="jsonl")
    notes = [told(left_out)] if left_out else []
    if train.optimizer == "adamw_8bit" and method.method != "full":
        train = replace(train, optimizer="adamw")
        notes.append("--optimizer adamw_8bit is for --method full: adamw, as there is little state")
    args = Arguments(model=model, data=data, method=method, train=train, notes=notes)
    if missing := [f"--{name}" for name in needed if not args.values()[name]]:
        raise ValueError(f"Pass {' and '.join(missing)} (on the command line or in --config).")
    check_arguments(args)
    if train.learning_rate is None:
        is_full = method.method == "full"
        rate = DEFAULT_LEARNING_RATE_OF_FULL if is_full else DEFAULT_LEARNING_RATE
        train = replace(train, learning_rate=rate)
    return replace(args, train=train)


def _said(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The flags of a command line and the words that follow each; words before all have no name."""
    name, words = "", list[str]()
    for word in argv:
        if not word.startswith("--"):
            words.append(word)
            continue
        yield name, words
        name, equals, value = word.removeprefix("--").partition("=")
        name, words = name.replace("-", "_"), [value] if equals else []
    yield name, words


def _as_words(name: str, value: str | list[str]) -> list[str]:
    """A flag and its value as a command line writes them."""
    words = value if isinstance(value, list) else [value]
    if name and len(words) == 1 and words[0].startswith("-"):
        return [f"--{name}={words[0]}"]
    return [f"--{name}", *words] if name else words


def _refuse_unknown(names: Iterable[str], parser: HfArgumentParser, where: str = "") -> None:
    """Refuse flags that there are not, all of them at once, with the nearest that there are."""
    own = {option[2:] for option in parser._option_string_actions if option[:2] == "--"}
    own = own - {"config", "help"} if where else own | {""}
    known = [*own, *RENAMED, *MEANINGS]
    told_names = []
    for name in names:
        if name not in own:
            near = get_close_matches(name, known, n=1, cutoff=0.75)
            told_names.append(f"--{name}" + "".join(f" (meaning --{other}?)" for other in near))
    if told_names:
        *first, last = told_names
        listed = f"are no flags {', '.join(first)} and {last}" if first else f"is no flag {last}"
        start = f"{where}there" if where else "There"
        raise ValueError(f"{start} {listed}: leave out what has no other name, see --help.")


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
    for part in _PARTS:
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
    if train.save_steps is not None and (strategy := train.save_strategy) in ("no", "epoch"):
        yield f"--save_strategy {strategy} has no steps between: leave --save_steps out."
    if train.load_best_model_at_end and train.eval_strategy == "no":
        yield "--load_best_model_at_end needs the held-out loss: leave --eval_strategy no out."
    if train.sam_layers and not train.sam_rho:
        yield "--sam_layers draws the layers of --sam_rho: pass that too."
    if data.evaluate_on == "dev" and not data.dev_examples:
        yield "--evaluate_on dev needs a development set: pass --dev_examples."
    calibrates = {
        "calibration_examples": method.calibration_examples,
        "calibration_head_steps": method.calibration_head_steps,
        "calibration_buffer_gb": method.fixed_buffer_gb != 0,
    }
    for flag in (flag for flag, is_given in calibrates.items() if method.mask and is_given):
        yield f"--mask skips calibration: leave --{flag} out."
    if method.mask and method.keep_zeros is not None:
        yield "--mask says which entries are trained: leave --keep_zeros out."
    if name in SPARSE_METHODS:
        return
    if method.mask is not None:
        yield f"--method {name} selects no entries: leave --mask out."
    if name in DENSE_METHODS and method.target_modules:
        yield f"--method {name} has no target layers: leave --target_modules out."
    if method.keep_zeros is not None:
        yield f"--method {name} selects no entries: leave --keep_zeros out."
    if method.sddmm_kernel != "auto":
        yield f"--method {name} selects no entries: leave --sddmm_kernel out."
    if train.sam_rho:
        yield f"--method {name} selects no entries: leave --sam_rho out."
    if train.max_steps == 0:
        yield f"--max_steps 0 writes a mask, and --method {name} has none."


def _raise(message: str) -> NoReturn:
    """Raises what argparse would print before it leaves the program."""
    raise ValueError(f"{message[:1].upper()}{message[1:]}: see --help.")
