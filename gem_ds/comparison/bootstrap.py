"""Which differences between methods are real: a paired bootstrap over seeds and test examples.

    score(m, v, w)  = sum_s v_s metric(m, s, w) / S     on the examples, each counted w times
    difference      = score(m, v, w) - score(reference, v, w)   the same v and w on both sides
    interval        = 2.5 % and 97.5 % quantile over resamples (v, w)

A resample draws S of the S seeds (seed s comes v_s times) and n of the n examples. A difference is
*real* when its interval excludes 0. That answers whether it would be seen with other seeds and on
other examples of the same kind, for each method by itself: nothing is corrected for the number of
comparisons. The spread of few seeds is underestimated, that of S by about (S - 1) / S in variance;
a single one says nothing of others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gem_ds.comparison.metrics import metric_on
from gem_ds.comparison.results import Predictions

NUM_RESAMPLES = 5_000
CONFIDENCE = 0.95

#: Weights held at once, which bounds memory.
_CHUNK = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much more a method scores than the reference, and the interval of that."""

    value: float
    low: float
    high: float

    @property
    def is_real(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """A method's metric, mean over its seeds: on the examples, and on each resample [b]."""

    value: float
    resampled: np.ndarray


def resample_scores(
    runs: Sequence[Predictions], metric: str, num_resamples: int = NUM_RESAMPLES
) -> Scores:
    """A method's metric on the resamples, which are the same for every method of as many runs.

    Args:
        runs: one of each seed, on the same n examples; to be compared, in the same order of seeds.
        metric: by name.
        num_resamples: b.

    Raises:
        ValueError: the predictions do not allow the metric.
    """
    num_examples = len(runs[0].ids)
    chunks = []
    for seed_weights, weights in resamples(len(runs), num_examples, num_resamples):
        by_seed = np.stack([metric_on(run, metric, weights) for run in runs], axis=1)  # [b, S]
        chunks.append((seed_weights * by_seed).sum(axis=1) / len(runs))
    once = np.ones((1, num_examples))
    value = float(np.mean([metric_on(run, metric, once) for run in runs]))
    return Scores(value=value, resampled=np.concatenate(chunks))


def difference(scores: Scores, reference: Scores) -> Difference:
    """How much more a method scores than the reference."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(scores.resampled - reference.resampled, (tail, 1 - tail))
    return Difference(value=scores.value - reference.value, low=float(low), high=float(high))


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


def refuse_other_examples(runs: Sequence[Predictions]) -> None:
    """Refuse runs that were not scored on the same examples.

    Raises:
        ValueError: they were not.
    """
    for run in runs:
        if run.ids != runs[0].ids or run.references != runs[0].references:
            raise ValueError("the runs were not scored on the same examples.")
