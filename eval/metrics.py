"""Metrics of the tasks: accuracy, until those of each task stand here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gem_ds.tasks import ChoiceExample, Example


def score(task: str, examples: Sequence[Example], predictions: Sequence[Any]) -> dict[str, float]:
    """The metrics of a task by name."""
    pairs = zip(examples, predictions, strict=True)
    right = sum(isinstance(e, ChoiceExample) and e.answer == p for e, p in pairs)
    return {"accuracy": right / len(examples)}


def main_metric(task: str) -> str:
    """Name of the metric that a task is ranked by."""
    return "accuracy"
