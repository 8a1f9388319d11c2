"""What a finished run has left: its score, its costs, and what it said of each example."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np

from gem_ds.comparison.cells import Cell, evaluation_of, folder_of
from gem_ds.comparison.grid import Comparison
from gem_ds.data.predictions import PREDICTIONS_FILE

T = TypeVar("T")

RESULTS_FILE = "all_results.json"

#: The loss where it is what runs are compared by.
LOSS = "eval_loss"

#: What the second command leaves, where a task has one.
EVALUATION_FILE = "eval/results.json"
VERDICTS_FILE = "eval/verdicts.jsonl"

#: Numbers that all_results.json must hold, beside the score.
COSTS = (
    *("num_trainable", "num_parameters", "peak_memory_bytes"),
    *("seconds_per_step", "calibration_seconds", "optimizer_state_bytes"),
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run: its task's main metric on its split, and the numbers `COSTS`.

    The loss is on the same examples, after training; infinite where there is none.
    """

    metric: str
    score: float
    loss: float
    costs: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """What a run said of each of the n examples, in the dataset's order."""

    ids: list[Any]
    correct: np.ndarray  # [n] share that is right, NaN where right and wrong mean nothing
    predictions: list[Any]  # labels, numbers or texts
    references: list[Any]  # the same of the dataset


def read_training(folder: Path) -> Result:
    """The result of the training program; ValueError where it is absent or not whole.

    Its score is the task's main metric, which comes first, or where the answers are generated, so
    that it has none, the loss on the held-out examples.
    """
    path = folder / RESULTS_FILE
    content = _read_json(path)
    loss, metrics = content.get("last_eval_loss"), content.get("eval_metrics")
    if not metrics and "last_eval_loss" in content:
        metrics = {LOSS: loss}
    if not isinstance(metrics, dict) or not metrics:
        raise ValueError(f"{path} has neither eval_metrics nor last_eval_loss.")
    metric, score = next(iter(metrics.items()))
    costs: dict[str, Any] = {cost: content.get(cost) for cost in COSTS}
    for name, value in {**costs, metric: score}.items():
        if not _is_number(value):
            raise ValueError(f"{path} has no number {name}.")
    loss = float(loss) if _is_number(loss) else math.inf
    return Result(metric=metric, score=float(score), loss=loss, costs=costs)


def read_result(comparison: Comparison, cell: Cell) -> Result:
    """The result of a run, evaluation included; ValueError where it is absent or not whole."""
    folder, evaluation = folder_of(comparison, cell), evaluation_of(comparison, cell)
    result = read_training(folder)
    if comparison.choose_by == "loss" and math.isinf(result.loss):
        raise ValueError(f"{folder / RESULTS_FILE} has no number last_eval_loss.")
    if evaluation is None:
        return result
    value: Any = _read_json(folder / EVALUATION_FILE)
    for key in evaluation.score.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not _is_number(value):
        raise ValueError(f"{folder / EVALUATION_FILE} has no number at {evaluation.score}.")
    return replace(result, metric=evaluation.metric or evaluation.score, score=float(value))


def read_predictions(comparison: Comparison, cell: Cell) -> Predictions:
    """What a finished run said of each example of its split; ValueError as `read_result`."""
    folder, evaluation = folder_of(comparison, cell), evaluation_of(comparison, cell)
    if evaluation is not None:
        return _read_verdicts(folder / VERDICTS_FILE, evaluation.correct)
    rows = _read_lines(folder / PREDICTIONS_FILE, ("id", "correct", "prediction", "reference"))
    return Predictions(
        ids=[row["id"] for row in rows],
        correct=np.array([row["correct"] for row in rows], dtype=np.float64),  # None becomes NaN
        predictions=[row["prediction"] for row in rows],
        references=[row["reference"] for row in rows],
    )


def _read_verdicts(path: Path, field: str) -> Predictions:
    """An evaluator's verdicts in ``field``, averaged over the samples of a problem.

    A verdict is a truth value, a number, or the word ``passed`` among other words.
    """
    judged: dict[Any, list[float]] = {}
    for row in _read_lines(path, ("task_id", field)):
        verdict = row[field]
        if verdict is None:
            raise ValueError(f"{path} has no verdict {field} of some samples")
        is_right = verdict == "passed" if isinstance(verdict, str) else float(verdict)
        judged.setdefault(row["task_id"], []).append(float(is_right))
    correct, nothing = np.array([np.mean(v) for v in judged.values()]), [None] * len(judged)
    return Predictions(ids=[*judged], correct=correct, predictions=nothing, references=nothing)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _read(path: Path, parse: Callable[[str], T]) -> T:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise ValueError(f"{path} is not whole.") from None


def _read_json(path: Path) -> dict[str, Any]:
    content = _read(path, json.loads)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object.")
    return content


def _read_lines(path: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = _read(path, lambda text: [json.loads(line) for line in text.split("\n") if line])
    if not rows:
        raise ValueError(f"{path} is empty.")
    for number, row in enumerate(rows, start=1):
        for name in fields:
            if not isinstance(row, dict) or name not in row:
                raise ValueError(f"{path} has no {name} in line {number}.")
    return rows
