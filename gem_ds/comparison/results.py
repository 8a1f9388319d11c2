"""What a finished run has left: its score, its costs, and what it said of each example."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from gem_ds.comparison.cells import Cell, evaluation_of, folder_of
from gem_ds.comparison.grid import Comparison
from gem_ds.data.predictions import PREDICTIONS_FILE

RESULTS_FILE = "all_results.json"

#: The loss where it is what runs are compared by.
LOSS = "eval_loss"

#: What the second command leaves, where a task has one.
EVALUATION_FILE, VERDICTS_FILE = "eval/results.json", "eval/verdicts.jsonl"
SAMPLES_FILE = "eval/samples.jsonl"

#: Numbers that all_results.json must hold, beside the score.
COSTS = (
    *("num_trainable", "num_parameters", "peak_memory_bytes"),
    *("seconds_per_step", "calibration_seconds", "optimizer_state_bytes"),
)

#: Of a finished run the name ``metric`` of its task's main metric, that as ``score``, the ``loss``
#: on the same examples after training, infinite where there is none, and `COSTS`.
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """What a run said of each of the n examples, in the dataset's order."""

    ids: list[Any]
    correct: np.ndarray  # [n] share that is right, NaN where right and wrong mean nothing
    predictions: list[Any]  # labels, numbers or texts
    references: list[Any]  # the same of the dataset


def read_training(folder: Path) -> Result:
    """The result of the training program: its first metric, or the loss where it has none."""
    path = folder / RESULTS_FILE
    content = _read_json(path)
    loss, metrics = content.get("last_eval_loss"), content.get("eval_metrics")
    if not metrics and "last_eval_loss" in content:
        metrics = {LOSS: loss}
    if not isinstance(metrics, dict) or not metrics:
        raise ValueError(f"{path} has neither eval_metrics nor last_eval_loss.")
    metric, score = next(iter(metrics.items()))
    costs = {cost: content.get(cost) for cost in COSTS}
    for name, value in {**costs, metric: score}.items():
        if not _is_number(value):
            raise ValueError(f"{path} has no number {name}.")
    loss = float(loss) if _is_number(loss) else math.inf
    return {"metric": metric, "score": float(score), "loss": loss, **costs}


def read_result(comparison: Comparison, cell: Cell) -> Result:
    """The result of a run, evaluation included; ValueError where it is absent or not whole."""
    folder, evaluation = folder_of(comparison, cell), evaluation_of(comparison, cell)
    result = read_training(folder)
    if comparison.choose_by == "loss" and math.isinf(result["loss"]):
        raise ValueError(f"{folder / RESULTS_FILE} has no number last_eval_loss.")
    if evaluation is None:
        return result
    value: Any = _read_json(folder / EVALUATION_FILE)
    for key in evaluation.score.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not _is_number(value):
        raise ValueError(f"{folder / EVALUATION_FILE} has no number at {evaluation.score}.")
    return result | {"metric": evaluation.metric or evaluation.score, "score": float(value)}


def read_predictions(comparison: Comparison, cell: Cell) -> Predictions:
    """What a finished run said of each example of its split; ValueError as `read_result`.

    Verdicts (a truth value, a number, the word ``passed`` or another) are averaged over samples.
    """
    folder, evaluation = folder_of(comparison, cell), evaluation_of(comparison, cell)
    if evaluation is None:
        fields = ("id", "correct", "prediction", "reference")
        ids, correct, predictions, references = _read_columns(folder / PREDICTIONS_FILE, fields)
        shares = np.array(correct, dtype=np.float64)  # None becomes NaN
        return Predictions(ids=ids, correct=shares, predictions=predictions, references=references)
    path, field = folder / VERDICTS_FILE, evaluation.correct
    names, verdicts = _read_columns(path, ("task_id", field))
    if None in verdicts:
        raise ValueError(f"{path} has no verdict {field} of some samples")
    judged = defaultdict[Any, list[float]](list)
    for name, verdict in zip(names, verdicts, strict=True):
        judged[name].append(float(verdict == "passed" if isinstance(verdict, str) else verdict))
    shares, nothing = np.array([np.mean(own) for own in judged.values()]), [None] * len(judged)
    return Predictions(ids=[*judged], correct=shares, predictions=nothing, references=nothing)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
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


def _read_columns(path: Path, fields: tuple[str, ...]) -> list[list[Any]]:
    rows = _read(path, lambda text: [json.loads(line) for line in text.split("\n") if line])
    if not rows:
        raise ValueError(f"{path} is empty.")
    for number, row in enumerate(rows, start=1):
        for name in fields:
            if not isinstance(row, dict) or name not in row:
                raise ValueError(f"{path} has no {name} in line {number}.")
    return [[row[name] for row in rows] for name in fields]
