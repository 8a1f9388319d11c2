"""The runs of a comparison: their folders, their commands, and which there are.

    search    task x method x learning rate, first seed, scored on the development split
    final     task x method x seed at the chosen rate, scored on the test split

A run is a *cell*: `Cell` says which, and its folder, say ``rte/gem/dev/lr1e-02_seed42``, follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from gem_ds.comparison.grid import Comparison, Evaluation
from gem_ds.train.methods import product_of

#: By what a method leaves, an evaluation's ``{model}`` and ``{weights}``.
_MODEL_AND_WEIGHTS = {
    "delta": ("{model}", ("--delta", "{output_dir}/delta.safetensors")),
    "adapter": ("{model}", ("--adapter", "{output_dir}/adapter")),
    "model": ("{output_dir}/model", ()),
}

#: The training program in a checkout, and the same anywhere.
PROGRAM, MODULE = "launch/train.py", "gem_ds.train"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run."""

    task: str
    method: str
    learning_rate: float
    seed: int
    split: Literal["dev", "test"]

    def __str__(self) -> str:
        return (
            f"{self.task} {self.method} at {rate_text(self.learning_rate)}, seed {self.seed}, "
            f"{self.split}"
        )


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
    """The second command of a run, of those that have one.

    The search is scored by the training program: an evaluation looks at the test split.
    """
    return comparison.tasks[cell.task].evaluate if cell.split == "test" else None


def training_command(comparison: Comparison, cell: Cell) -> list[str]:
    """The command that trains a cell and scores it on its split."""
    task, method = comparison.tasks[cell.task], comparison.methods[cell.method]
    own = {
        "method": cell.method,
        "task": cell.task,
        "data_dir": task.data_dir,
        "seed": cell.seed,
        "learning_rate": rate_text(cell.learning_rate),
        "dev_examples": task.dev_examples or comparison.dev_examples,
        "evaluate_on": cell.split,
        "output_dir": folder_of(comparison, cell),
        "overwrite_output_dir": True,
    }
    flags = comparison.common | task.flags | method.flags | own
    words = [*comparison.launcher, *program_of(comparison)]
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *_words(value)]
    return words


def program_of(comparison: Comparison) -> tuple[str, ...]:
    """What comes behind the launcher: outside of a checkout the installed module."""
    if comparison.program is not None:
        return (comparison.program,)
    if Path(PROGRAM).is_file() and Path.cwd() == Path(__file__).resolve().parents[2]:
        return (PROGRAM,)
    return ("-m" if comparison.launcher == ("python",) else "--module", MODULE)


def evaluation_command(comparison: Comparison, cell: Cell) -> list[str] | None:
    """The command that scores what was trained, if there is one."""
    evaluation, task = evaluation_of(comparison, cell), comparison.tasks[cell.task]
    if evaluation is None:
        return None
    model, weights = _MODEL_AND_WEIGHTS[product_of(cell.method)]
    flags = comparison.common | task.flags | comparison.methods[cell.method].flags
    outer = {
        "{output_dir}": str(folder_of(comparison, cell)),
        "{data_dir}": task.data_dir or "",
        "{seed}": str(cell.seed),
    }
    model = _fill(model, outer | {"{model}": str(flags.get("model_name_or_path", ""))})
    words: list[str] = []
    for word in evaluation.command:
        chosen = weights if word == "{weights}" else (word,)
        words += [_fill(part, outer | {"{model}": model}) for part in chosen]
    return words


def _fill(text: str, values: Mapping[str, str]) -> str:
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return text


def _words(value: Any) -> list[str]:
    """A flag's value on the command line."""
    if isinstance(value, list):
        return [word for item in value for word in _words(item)]
    return [str(value).lower() if isinstance(value, bool) else str(value)]
