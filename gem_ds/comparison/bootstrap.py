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
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean, stdev

import numpy as np
import pandas as pd
from scipy.stats import t as student

from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.metrics import is_loss, metric_on
from gem_ds.comparison.results import Predictions, read_predictions
from gem_ds.train.methods import METHODS

#: The method that the others are measured against, where it takes part; else it is the first.
REFERENCE = METHODS[0]

NUM_RESAMPLES = 5_000
CONFIDENCE = 0.95

#: Weights held at once, which bounds memory.
_CHUNK = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A method's mean, or how much more it is than the reference's, and the interval of that."""

    value: float
    low: float
    high: float

    @property
    def is_real(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the paired bootstrap says of a task."""

    reference: str  # the method that the others are measured against
    scores: Mapping[str, Interval] = field(default_factory=dict)  # of each method
    differences: Mapping[str, Interval] = field(default_factory=dict)  # of the others
    losses: Mapping[str, Interval] = field(default_factory=dict)  # the same of the loss, if wanted
    note: str = ""  # what a reader must know


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """A method's metric, mean over its seeds: on the examples, and on each resample [b]."""

    value: float
    resampled: np.ndarray


def resample_scores(
    runs: Sequence[Predictions], metric: str, num_resamples: int = NUM_RESAMPLES
) -> Scores:
    """A method's metric on the resamples, which are the same for every method of as many runs.

    The runs are one of each seed, on the same n examples, in the same order of seeds. Raises
    ValueError where the predictions do not allow the metric.
    """
    num_examples = len(runs[0].ids)
    chunks = []
    for seed_weights, weights in resamples(len(runs), num_examples, num_resamples):
        by_seed = np.stack([metric_on(run, metric, weights) for run in runs], axis=1)  # [b, S]
        chunks.append((seed_weights * by_seed).sum(axis=1) / len(runs))
    once = np.ones((1, num_examples))
    value = float(np.mean([metric_on(run, metric, once) for run in runs]))
    return Scores(value=value, resampled=np.concatenate(chunks))


def interval(scores: Scores, reference: Scores | None = None) -> Interval:
    """A method's score, or how much more it is than the reference's."""
    value, resampled = scores.value, scores.resampled
    if reference is not None:
        value, resampled = value - reference.value, resampled - reference.resampled
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail))
    return Interval(value=value, low=float(low), high=float(high))


def interval_over_seeds(values: Sequence[float]) -> Interval:
    """Student's interval of the mean of a number by seed; of less than two it is NaN."""
    mean, reach = fmean(values) if len(values) else math.nan, math.nan
    if len(values) > 1:
        quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
        reach = quantile * stdev(values) / math.sqrt(len(values))
    return Interval(value=mean, low=mean - reach, high=mean + reach)


def resamples(
    num_seeds: int, num_examples: int, num_resamples: int, random_seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """How often each seed [b, S] and each example [b, n] was drawn, a part of them at a time."""
    rng = np.random.default_rng(random_seed)
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


def compare_methods(comparison: Comparison, runs: pd.DataFrame) -> Findings:
    """The paired bootstrap on one task's finished final runs, over the seeds that both sides have.

    They are lines of the frame that :mod:`gem_ds.comparison.table` makes.
    """
    methods = {str(name): own.set_index("seed") for name, own in runs.groupby("method", sort=False)}
    reference = REFERENCE if REFERENCE in methods else next(iter(methods), REFERENCE)
    shared = {
        name: tuple(own.index.intersection(methods[reference].index, sort=False))
        for name, own in methods.items()
    }
    others = [name for name, seeds in shared.items() if seeds and name != reference]
    losses = {}
    for name in others if comparison.choose_by == "loss" else ():
        own, base = (methods[each].loss[list(shared[name])] for each in (name, reference))
        losses[name] = interval_over_seeds(list(own - base))
    metric = next(iter(runs.metric), "")
    try:
        if is_loss(metric) or any(runs.metric != metric):
            raise ValueError("the bootstrap needs one metric, which is no loss.")
        said = {cell: read_predictions(comparison, cell) for cell in runs.cell}
        refuse_other_examples(list(said.values()))

        @cache
        def scores(method: str, seeds: tuple[int, ...]) -> Scores:
            return resample_scores([said[methods[method].cell[seed]] for seed in seeds], metric)

        whole = {name: scores(name, tuple(own.index)) for name, own in methods.items()}
        differences = {
            name: interval(scores(name, shared[name]), scores(reference, shared[name]))
            for name in others
        }
    except ValueError as error:
        return Findings(reference=reference, losses=losses, note=f"Not computed: {error}")
    strays = any(abs(whole[name].value - fmean(own.score)) > 1e-4 for name, own in methods.items())
    return Findings(
        reference=reference,
        scores={name: interval(own) for name, own in whole.items()},
        differences=differences,
        losses=losses,
        note="Of the share of right answers, which is not the metric above." if strays else "",
    )


def refuse_other_examples(runs: Sequence[Predictions]) -> None:
    """Refuse runs that were not scored on the same examples."""
    for run in runs:
        if run.ids != runs[0].ids or run.references != runs[0].references:
            raise ValueError("the runs were not scored on the same examples.")
