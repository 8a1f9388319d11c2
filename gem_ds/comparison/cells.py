"""The runs of a comparison: which there are, their folders, their commands.

    search    task x method x learning rate, first seed, scored on the development split
    final     task x method x seed at the chosen rate, scored on the test split

A run is a *cell*: `Cell` says which, and its folder, say ``rte/gem/dev/lr1e-02_seed42``, follows.
In that, beside what its programs write, are ``cell.json``, the commands, and ``log.txt``, what they
printed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from gem_ds.comparison.grid import Comparison, Evaluation
from gem_ds.train.methods import product_of

#: The training program in a checkout, and the same anywhere.
PROGRAM, MODULE = "launch/train.py", "gem_ds.train"

CELL_FILE, LOG_FILE = "cell.json", "log.txt"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run."""

    task: str
    method: str
    learning_rate: float
    seed: int
    split: Literal["dev", "test"]

    def __str__(self) -> str:
        rate = rate_text(self.learning_rate)
        return f"{self.task} {self.method} at {rate}, seed {self.seed}, {self.split}"


def rate_text(rate: float) -> str:
    """A learning rate as folders, commands and tables have it: 1e-02, 1.5e-03."""
    mantissa, exponent = f"{Decimal(repr(rate)).normalize():e}".split("e")
    return f"{mantissa}e{int(exponent):+03d}"


def search_cells(comparison: Comparison) -> list[Cell]:
    """The runs that choose learning rates; a single rate needs none."""
    return [
        Cell(task=task, method=name, learning_rate=rate, seed=comparison.seeds[0], split="dev")
        for task in comparison.tasks
        for name, method in comparison.methods.items()
        if len(method.learning_rates) > 1
        for rate in method.learning_rates
    ]


def final_cells(
    comparison: Comparison, rates: Mapping[tuple[str, str], float | None]
) -> list[Cell]:
    """The runs that are reported, at the rates chosen by task and method, if there is one."""
    return [
        Cell(task=task, method=method, learning_rate=rate, seed=seed, split="test")
        for (task, method), rate in rates.items()
        if rate is not None
        for seed in comparison.seeds
    ]


def folder_of(comparison: Comparison, cell: Cell) -> Path:
    """Where a run writes."""
    name = f"lr{rate_text(cell.learning_rate)}_seed{cell.seed}"
    return comparison.output_dir / cell.task / cell.method / cell.split / name


def evaluation_of(comparison: Comparison, cell: Cell) -> Evaluation | None:
    """The second command of a final run, if its task has one; the training scores the search."""
    return comparison.tasks[cell.task].evaluate if cell.split == "test" else None


def training_command(comparison: Comparison, cell: Cell) -> list[str]:
    """The command that trains a cell and scores it on its split."""
    task = comparison.tasks[cell.task]
    own = {
        "method": comparison.methods[cell.method].method,
        "task": task.task,
        "data_dir": task.data_dir,
        "seed": cell.seed,
        "learning_rate": rate_text(cell.learning_rate),
        "dev_examples": task.dev_examples or comparison.dev_examples,
        "evaluate_on": cell.split,
        "output_dir": folder_of(comparison, cell),
        "overwrite_output_dir": True,
    }
    words = [*comparison.launcher]
    if comparison.program is not None:
        words += [comparison.program]
    elif Path(PROGRAM).is_file() and Path.cwd() == Path(__file__).resolve().parents[2]:
        words += [PROGRAM]
    else:  # outside of a checkout
        words += ["-m" if comparison.launcher == ("python",) else "--module", MODULE]
    for name, value in (_flags_of(comparison, cell) | own).items():
        if value is not None:
            words += [f"--{name}", *_words(value)]
    return words


def evaluation_command(comparison: Comparison, cell: Cell) -> list[str]:
    """The command that scores what was trained; empty where there is none."""
    folder = folder_of(comparison, cell)
    product = product_of(comparison.methods[cell.method].method)
    base = str(_flags_of(comparison, cell).get("model_name_or_path", ""))
    weights = {
        "delta": ["--delta", f"{folder}/delta.safetensors"],
        "adapter": ["--adapter", f"{folder}/adapter"],
        "model": [],
    }
    values = {
        "{output_dir}": str(folder),
        "{data_dir}": comparison.tasks[cell.task].data_dir or "",
        "{seed}": str(cell.seed),
        "{model}": f"{folder}/model" if product == "model" else base,
    }
    evaluation, words = evaluation_of(comparison, cell), list[str]()
    for word in evaluation.command if evaluation else ():
        for placeholder, value in values.items():
            word = word.replace(placeholder, value)
        words += weights[product] if word == "{weights}" else [word]
    return words


def commands_of(comparison: Comparison, cell: Cell) -> dict[str, str]:
    """What cell.json holds."""
    commands = {"train": training_command, "evaluate": evaluation_command}
    found = {name: command(comparison, cell) for name, command in commands.items()}
    return {name: shlex.join(words) for name, words in found.items() if words}


def refuse_other_commands(comparison: Comparison, cell: Cell) -> None:
    """Refuse a folder whose run is not the one that the file now asks for."""
    folder = folder_of(comparison, cell)
    path = folder / CELL_FILE
    if not path.exists():
        if folder.is_dir() and set(os.listdir(folder)) - {LOG_FILE}:
            raise ValueError(
                f"{folder} holds files of something else: delete it, or choose another output_dir."
            )
    elif parting := _difference(path.read_bytes(), commands_of(comparison, cell)):
        raise ValueError(
            f"{folder} holds a run of another command ({parting}): delete that folder, or choose "
            "another output_dir."
        )


def _difference(content: bytes, wanted: dict[str, str]) -> str:
    """In words, where the commands of a cell.json part from others; empty where they do not."""
    try:
        found = json.loads(content)
    except ValueError:
        found = {}
    if not isinstance(found, dict) or not found:
        return "its cell.json is damaged"
    by_module = rf" (-m|--module) {re.escape(MODULE)} "  # the same program by another name
    for name in wanted | found:
        old, new = (
            shlex.split(re.sub(by_module, f" {PROGRAM} ", commands.get(name, "")))
            for commands in (found, wanted)
        )
        for before, now, flag in zip_longest(old, new, ["", *old], fillvalue=""):
            if before != now:
                flag = flag if flag.startswith("--") else name
                return f"{flag}: {before or 'nothing'}, now {now or 'nothing'}"
    return ""


def _flags_of(comparison: Comparison, cell: Cell) -> dict[str, Any]:
    """The file's flags of a run."""
    task, method = comparison.tasks[cell.task], comparison.methods[cell.method]
    return comparison.common | task.flags | method.flags


def _words(value: Any) -> list[str]:
    """A flag's value on the command line."""
    if isinstance(value, list):
        return [word for item in value for word in _words(item)]
    return [str(value).lower() if isinstance(value, bool) else str(value)]
