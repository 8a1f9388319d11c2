"""A task's main metric: how it is written, and on many weighted sets of examples at once.

    matthews_correlation    of the confusion table of references and predictions
    f1a                     F1 of the label 1
    pearson                 correlation of references and predictions
    all others              mean of ``correct``

A weighting is how often each example was drawn, so that a metric of [b, n] weights is [b] values of
the metric, those that it would have on the b resamples. (data/metrics.py, whose names these are,
computes the same one by one, and the tests compare.) Where a metric is undefined, for instance the
correlation with a constant, it is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gem_ds.comparison.results import Predictions

Metric = Callable[[Sequence[Any], Sequence[Any], np.ndarray], np.ndarray]


def metric_on(predictions: Predictions, name: str, weights: np.ndarray) -> np.ndarray:
    """A run's metric, [b] values of [b, n] weightings of its n examples.

    Raises:
        ValueError: the predictions do not allow this metric.
    """
    if metric := METRICS.get(name):
        return metric(predictions.references, predictions.predictions, weights)
    if np.isnan(predictions.correct).any():
        raise ValueError(f"{name} is not known, and some examples are neither right nor wrong.")
    return np.asarray(weights @ predictions.correct / weights.sum(axis=1))


def is_loss(name: str) -> bool:
    """Whether less is better."""
    return name.endswith("loss")


class Unit:
    """How a metric is written: per cent, a correlation, or a loss."""

    def __init__(self, metric: str) -> None:
        self.is_loss = is_loss(metric)
        # In [-1, 1], a percentage would mislead.
        self.is_share = not self.is_loss and METRICS.get(metric) not in (matthews, pearson)
        self.factor = 100 if self.is_share else 1
        self.decimals = 1 if self.is_share else 3
        name = metric.replace("_", " ")
        self.label = f"{name} (%)" if self.is_share else name

    def write(self, value: float, *, sign: bool = False) -> str:
        """A score, or with its sign a difference."""
        text = f"{value * self.factor:.{self.decimals}f}"
        if float(text) == 0:
            text = text.removeprefix("-")
        return f"+{text}" if sign and float(text) > 0 else text

    def write_range(self, low: float, high: float, *, sign: bool = False) -> str:
        """An interval, if there is one."""
        if math.isnan(low):
            return ""
        return f"{self.write(low, sign=sign)} to {self.write(high, sign=sign)}"

    def write_spread(self, mean: float, std: float) -> str:
        """Mean and standard deviation, if there is one."""
        return self.write(mean) + ("" if math.isnan(std) else f" ± {self.write(std)}")


def matthews(references: Sequence[Any], predictions: Sequence[Any], weights: np.ndarray) -> Any:
    """Matthews' correlation, of any number of labels; [b] from [b, n] weights."""
    table = _confusion(references, predictions, weights)
    truth, guess = table.sum(axis=2), table.sum(axis=1)
    right, total = np.trace(table, axis1=1, axis2=2), table.sum(axis=(1, 2))
    covariance = right * total - (truth * guess).sum(axis=1)
    spread = (total**2 - (truth**2).sum(axis=1)) * (total**2 - (guess**2).sum(axis=1))
    return _ratio(covariance, np.sqrt(spread))


def f1_of_label_1(
    references: Sequence[Any], predictions: Sequence[Any], weights: np.ndarray
) -> Any:
    """F1 of the label 1; [b] from [b, n] weights."""
    truth, guess = np.asarray(references) == 1, np.asarray(predictions) == 1
    return _ratio(2 * weights @ (truth & guess), weights @ truth + weights @ guess)


def pearson(references: Sequence[Any], predictions: Sequence[Any], weights: np.ndarray) -> Any:
    """Pearson's correlation; [b] from [b, n] weights."""
    total = weights.sum(axis=1, keepdims=True)
    x, y = (np.asarray(side, dtype=np.float64) for side in (references, predictions))
    x = x - (weights @ x)[:, None] / total
    y = y - (weights @ y)[:, None] / total
    spread = (weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1)
    return _ratio((weights * x * y).sum(axis=1), np.sqrt(spread))


#: By their names in data/metrics.py, the main ones of tasks that are no mean over the examples.
METRICS: dict[str, Metric] = {
    "matthews_correlation": matthews,
    "f1a": f1_of_label_1,
    "pearson": pearson,
}


def _confusion(
    references: Sequence[Any], predictions: Sequence[Any], weights: np.ndarray
) -> np.ndarray:
    """[b, c, c] weight by reference and prediction, of the c labels that occur."""
    labels, places = np.unique([references, predictions], return_inverse=True)
    truth, guess = places.reshape(2, -1)
    size = len(labels)
    pairs = truth * size + guess
    table = np.stack([weights[:, pairs == pair].sum(axis=1) for pair in range(size**2)], axis=1)
    return table.reshape(-1, size, size)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Their ratio, 0 where there is none."""
    tiny = denominator <= 1e-12
    return np.where(tiny, 0.0, numerator / np.where(tiny, 1.0, denominator))
