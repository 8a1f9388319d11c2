"""What is compared: methods x tasks x seeds x learning rates, as plain values.

The file that says it is described in `gem_ds.comparison.grid_file`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Flags = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The second command of a run, and where its result stands in the files that it writes."""

    command: tuple[str, ...]
    score: str
    correct: str
    metric: str


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method with the learning rates that it is given, ascending."""

    learning_rates: tuple[float, ...]
    flags: Flags = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task with its data; ``dev_examples`` where the comparison's number does not suit it."""

    data_dir: str | None = None
    dev_examples: int | None = None
    flags: Flags = field(default_factory=dict)
    evaluate: Evaluation | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that the file says; methods and tasks in its order."""

    output_dir: Path
    methods: dict[str, Method]
    tasks: dict[str, Task]
    seeds: tuple[int, ...]
    dev_examples: int
    common: Flags = field(default_factory=dict)
    launcher: tuple[str, ...] = ("python",)
    program: str = "launch/train.py"
    num_parallel: int = 1
    devices: tuple[str, ...] | None = None
