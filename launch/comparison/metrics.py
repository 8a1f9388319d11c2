"""A task's main metric on a weighted set of examples, for many weightings at once.

    accuracy and the like       mean of ``correct``
    matthews, f1, f1_macro      of the confusion table of references and predictions
    pearson, spearman           correlation of references and predictions

A weighting is how often each example was drawn, so that a metric of [b, n] weights is [b] values of
the metric, those that it would have on the b resamples. (scikit-learn and scipy compute the same
one by one, and the tests compare.) Where a metric is undefined, for instance the correlation with a
constant, it is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from launch.comparison.results import Predictions

Metric = Callable[[Sequence[Any], Sequence[Any], np.ndarray], np.ndarray]


def metric_on(predictions: Predictions, name: str, weights: np.ndarray) -> np.ndarray:
    """A run's metric under weightings of the examples.

    Args:
        predictions: of n examples.
        name: of the metric; one that `METRICS` does not know is the mean of ``correct``.
        weights: [b, n] how often each example counts.

    Returns:
        [b] values.

    Raises:
        ValueError: the predictions do not allow this metric.
    """
    if metric := METRICS.get(name):
        return metric(predictions.references, predictions.predictions, weights)
    if np.isnan(predictions.correct).any():
        raise ValueError(f"{name} is not known, and some examples are neither right nor wrong.")
    return weights @ predictions.correct / weights.sum(axis=1)


def is_loss(name: str) -> bool:
    """Whether less is better."""
    return name.endswith(("loss", "perplexity"))


def is_correlation(name: str) -> bool:
    """Whether it lies in [-1, 1], so that a percentage would mislead."""
    return METRICS.get(name) in (matthews, pearson, spearman)


def matthews(references: Sequence[Any], predictions: Sequence[Any], weights: np.ndarray) -> Any:
    """Matthews correlation, of any number of classes; [b] from [b, n] weights."""
    table = _confusion(references, predictions, weights)[0]
    truth, guess = table.sum(axis=2), table.sum(axis=1)
    right, total = np.trace(table, axis1=1, axis2=2), table.sum(axis=(1, 2))
    covariance = right * total - (truth * guess).sum(axis=1)
    spread = (total**2 - (truth**2).sum(axis=1)) * (total**2 - (guess**2).sum(axis=1))
    return _ratio(covariance, np.sqrt(spread))


def f1(references: Sequence[Any], predictions: Sequence[Any], weights: np.ndarray) -> Any:
    """F1 of the class 1; [b] from [b, n] weights.

    Raises:
        ValueError: the references are not 0 and 1.
    """
    by_class, labels = _f1_by_class(references, predictions, weights)
    if not {str(int(r)) if isinstance(r, int) else str(r) for r in references} <= {"0", "1"}:
        raise ValueError("F1 of two classes needs the labels 0 and 1.")
    return np.nan_to_num(by_class[:, labels.index("1")] if "1" in labels else 0 * weights[:, 0])


def f1_macro(references: Sequence[Any], predictions: Sequence[Any], weights: np.ndarray) -> Any:
    """Mean of the F1 of the classes that occur; [b] from [b, n] weights."""
    by_class, _ = _f1_by_class(references, predictions, weights)
    return np.nanmean(by_class, axis=1)


def pearson(references: Sequence[Any], predictions: Sequence[Any], weights: np.ndarray) -> Any:
    """Pearson correlation; [b] from [b, n] weights."""
    shape = weights.shape
    x = np.broadcast_to(np.asarray(references, dtype=np.float64), shape)
    y = np.broadcast_to(np.asarray(predictions, dtype=np.float64), shape)
    return _correlation(x, y, weights)


def spearman(references: Sequence[Any], predictions: Sequence[Any], weights: np.ndarray) -> Any:
    """Spearman correlation: Pearson's of the ranks within each resample; [b] from [b, n]."""
    return _correlation(_ranks(references, weights), _ranks(predictions, weights), weights)


#: By the names under which programs report them.
METRICS: dict[str, Metric] = {
    "matthews": matthews,
    "matthews_correlation": matthews,
    "mcc": matthews,
    "f1": f1,
    "f1_macro": f1_macro,
    "macro_f1": f1_macro,
    "pearson": pearson,
    "pearsonr": pearson,
    "spearman": spearman,
    "spearmanr": spearman,
}


def _confusion(
    references: Sequence[Any], predictions: Sequence[Any], weights: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """[b, c, c] weight by reference and prediction, and the c labels as texts."""
    truth, guess = (
        [str(int(label)) if isinstance(label, int) else str(label) for label in side]
        for side in (references, predictions)
    )
    labels = sorted({*truth, *guess})
    place = {label: index for index, label in enumerate(labels)}
    size = len(labels)
    pairs = np.array([place[t] * size + place[g] for t, g in zip(truth, guess, strict=True)])
    table = np.stack([weights[:, pairs == pair].sum(axis=1) for pair in range(size**2)], axis=1)
    return table.reshape(-1, size, size).astype(np.float64), labels


def _f1_by_class(
    references: Sequence[Any], predictions: Sequence[Any], weights: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """[b, c] F1 by class, NaN where it occurs neither as reference nor as prediction."""
    table, labels = _confusion(references, predictions, weights)
    both = table.sum(axis=1) + table.sum(axis=2)
    right = np.diagonal(table, axis1=1, axis2=2)
    return np.where(both > 0, _ratio(2 * right, both), np.nan), labels


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted Pearson correlation of the rows of x and y, all [b, n]."""
    total = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / total
    y = y - (weights * y).sum(axis=1, keepdims=True) / total
    spread = (weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1)
    return _ratio((weights * x * y).sum(axis=1), np.sqrt(spread))


def _ranks(values: Sequence[Any], weights: np.ndarray) -> np.ndarray:
    """[b, n] mean rank of each value within the resample, in which values come weights times."""
    _, place = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(place.max() + 1))
    count = np.add.reduceat(weights[:, order], starts, axis=1)  # [b, u] of each distinct value
    below = np.cumsum(count, axis=1) - count
    return (below + (count + 1) / 2)[:, place]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Their ratio, 0 where there is none."""
    tiny = denominator <= 1e-12
    return np.where(tiny, 0.0, numerator / np.where(tiny, 1.0, denominator))
