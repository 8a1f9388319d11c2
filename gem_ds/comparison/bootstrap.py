"""Which differences between methods are real: a paired bootstrap over seeds and test examples.

    score(m, v, w)  = sum_s v_s metric(m, s, w) / S     on the examples, each counted w times
    difference      = score(m, v, w) - score(reference, v, w)   the same v and w on both sides
    interval        = 2.5 % and 97.5 % quantile over resamples (v, w), of either

A resample draws S of the S seeds (seed s comes v_s times) and n of the n examples. A difference is
*real* when its interval excludes 0. That answers whether it would be seen with other seeds and on
other examples of the same kind, for each method by itself: nothing is corrected for the number of
comparisons. The spread of few seeds is underestimated, that of S by about (S - 1) / S in variance;
a single one says nothing of others.

A loss is not known by example. Its interval is Student's, over the seeds alone.

The metrics are those of data/metrics.py, here on many weightings of n examples at once: of [b, n]
weights there are [b] values. What is undefined, as the correlation with a constant, is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.results import Predictions, read_predictions
from gem_ds.train.methods import METHODS

#: The method that the others are measured against, where it takes part; else it is the first.
REFERENCE = METHODS[0]

NUM_RESAMPLES = 5_000
CONFIDENCE = 0.95

_CHUNK = 2_000_000  # weights held at once, which bounds memory


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number and its interval."""

    value: float
    low: float
    high: float

    @property
    def is_real(self) -> bool:
        """Of a difference, whether its interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the paired bootstrap says of a task."""

    reference: str  # the method that the others are measured against
    scores: Mapping[str, Interval] = field(default_factory=dict)  # of each method
    differences: Mapping[str, Interval] = field(default_factory=dict)  # by how much others are more
    losses: Mapping[str, Interval] = field(default_factory=dict)  # the same of the loss, if wanted
    note: str = ""  # what a reader must know


def resample_scores(runs: Sequence[Predictions], metric: str) -> np.ndarray:
    """[1 + b] a method's metric, mean over its runs: on the examples, and on each resample.

    There is a run of each seed. The resamples are the same for every method of as many runs.
    """
    num_examples = len(runs[0].ids)
    once = np.ones((1, num_examples))
    parts = [np.mean([metric_on(run, metric, once) for run in runs], axis=0)]
    for seed_weights, weights in resamples(len(runs), num_examples, NUM_RESAMPLES):
        by_seed = np.stack([metric_on(run, metric, weights) for run in runs], axis=1)  # [b, S]
        parts.append((seed_weights * by_seed).sum(axis=1) / len(runs))
    return np.concatenate(parts)


def interval(scores: np.ndarray) -> Interval:
    """That of scores, or of their differences, as :func:`resample_scores` returns them."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(scores[1:], (tail, 1 - tail))
    return Interval(value=float(scores[0]), low=float(low), high=float(high))


def interval_over_seeds(values: Sequence[float]) -> Interval:
    """Student's interval of the mean of a number by seed; of less than two it is NaN."""
    mean, reach = fmean(values) if len(values) else math.nan, math.nan
    if len(values) > 1:
        quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
        reach = quantile * stdev(values) / math.sqrt(len(values))
    return Interval(value=mean, low=mean - reach, high=mean + reach)


def resamples(
    num_seeds: int, num_examples: int, num_resamples: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """How often each seed [b, S] and each example [b, n] was drawn, a part of them at a time."""
    rng = np.random.default_rng(0)
    seeds = _counts(rng.integers(num_seeds, size=(num_resamples, num_seeds)))
    size = max(1, _CHUNK // num_examples)
    for start in range(0, num_resamples, size):
        part = seeds[start : start + size]
        yield part, _counts(rng.integers(num_examples, size=(len(part), num_examples)))


def _counts(drawn: np.ndarray) -> np.ndarray:
    """[b, n] how often each of 0 ... n - 1 stands in the rows of [b, n] draws."""
    rows, size = drawn.shape
    places = drawn + np.arange(rows)[:, None] * size
    return np.bincount(places.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)


def is_loss(metric: str) -> bool:
    """Whether less is better."""
    return metric.endswith("loss")


def metric_on(predictions: Predictions, name: str, weights: np.ndarray) -> Any:
    """A run's metric by weighting; a ValueError where the predictions do not allow it."""
    if metric := METRICS.get(name):
        return metric(predictions.references, predictions.predictions, weights)
    if np.isnan(predictions.correct).any():
        raise ValueError(f"{name} is not known, and some examples are neither right nor wrong.")
    return weights @ predictions.correct / weights.sum(axis=1)


def matthews(references: Sequence[Any], predictions: Sequence[Any], weights: np.ndarray) -> Any:
    """Matthews' correlation, of any number of labels."""
    labels, places = np.unique([references, predictions], return_inverse=True)
    size, (truths, guesses) = len(labels), places.reshape(2, -1)
    pairs = truths * size + guesses
    counts = [weights[:, pairs == pair].sum(axis=1) for pair in range(size**2)]
    table = np.stack(counts, axis=1).reshape(-1, size, size)  # [b, c, c] confusion of c labels
    truth, guess = table.sum(axis=2), table.sum(axis=1)
    right, total = np.trace(table, axis1=1, axis2=2), table.sum(axis=(1, 2))
    covariance = right * total - (truth * guess).sum(axis=1)
    spread = (total**2 - (truth**2).sum(axis=1)) * (total**2 - (guess**2).sum(axis=1))
    return _ratio(covariance, np.sqrt(spread))


def f1(references: Sequence[Any], predictions: Sequence[Any], weights: np.ndarray) -> Any:
    """F1 of the label 1."""
    truth, guess = np.asarray(references) == 1, np.asarray(predictions) == 1
    return _ratio(2 * weights @ (truth & guess), weights @ truth + weights @ guess)


def pearson(references: Sequence[Any], predictions: Sequence[Any], weights: np.ndarray) -> Any:
    """Pearson's correlation."""
    total = weights.sum(axis=1, keepdims=True)
    x, y = (np.asarray(side, dtype=np.float64) for side in (references, predictions))
    x = x - (weights @ x)[:, None] / total
    y = y - (weights @ y)[:, None] / total
    spread = (weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1)
    return _ratio((weights * x * y).sum(axis=1), np.sqrt(spread))


#: By their names in data/metrics.py, the main ones of tasks that are no mean over the examples.
METRICS = {"matthews_correlation": matthews, "f1a": f1, "pearson": pearson}


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Their ratio, 0 where there is none."""
    tiny = denominator <= 1e-12
    return np.where(tiny, 0.0, numerator / np.where(tiny, 1.0, denominator))


def compare_methods(comparison: Comparison, runs: pd.DataFrame) -> Findings:
    """Of one task's finished final runs, lines of a table of cells; over seeds of both sides."""
    methods = {str(name): own.set_index("seed") for name, own in runs.groupby("method", sort=False)}
    reference = REFERENCE if REFERENCE in methods else next(iter(methods), REFERENCE)
    shared = {
        name: tuple(own.index.intersection(methods[reference].index, sort=False))
        for name, own in methods.items()
    }
    others = [name for name, seeds in shared.items() if seeds and name != reference]
    losses = {}
    for name in others if comparison.choose_by == "loss" else ():
        more = (methods[name].loss - methods[reference].loss).dropna()  # paired by seed
        losses[name] = interval_over_seeds(list(more))
    metric = next(iter(runs.metric), "")
    try:
        if is_loss(metric) or any(runs.metric != metric):
            raise ValueError("the bootstrap needs one metric, which is no loss.")
        said = {cell: read_predictions(comparison, cell) for cell in runs.cell}
        examples = [(run.ids, run.references) for run in said.values()]
        if any(each != examples[0] for each in examples):
            raise ValueError("the runs were not scored on the same examples.")

        @cache
        def scores(method: str, seeds: tuple[int, ...]) -> np.ndarray:
            return resample_scores([said[methods[method].cell[seed]] for seed in seeds], metric)

        whole = {name: scores(name, tuple(own.index)) for name, own in methods.items()}
        differences = {
            name: interval(scores(name, shared[name]) - scores(reference, shared[name]))
            for name in others
        }
    except ValueError as error:
        return Findings(reference=reference, losses=losses, note=f"Not computed: {error}")
    strays = any(abs(whole[name][0] - fmean(own.score)) > 1e-4 for name, own in methods.items())
    return Findings(
        reference=reference,
        scores={name: interval(own) for name, own in whole.items()},
        differences=differences,
        losses=losses,
        note="Of the share of right answers, which is not the metric above." if strays else "",
    )
