"""Which differences between methods are real: a paired bootstrap over the test examples.

    score(m, w)  = mean over m's seeds of the metric on the examples, each counted w times
    difference   = score(m, w) - score(reference, w)       the same w on both sides
    interval     = 2.5 % and 97.5 % quantile over resamples w (n draws from n examples)

A difference is *real* when its interval excludes 0. That answers whether it would be seen on other
examples of the same kind; seeds are averaged, not resampled, so it does not say how it would be for
other seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from launch.comparison.metrics import metric_on
from launch.comparison.results import Predictions

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
    """A method's metric on the resamples, which are the same for every method.

    Args:
        runs: of its seeds, on the same n examples.
        metric: by name.
        num_resamples: b.

    Raises:
        ValueError: the predictions do not allow the metric.
    """
    num_examples = len(runs[0].ids)
    chunks = [
        np.mean([metric_on(run, metric, weights) for run in runs], axis=0)
        for weights in resamples(num_examples, num_resamples)
    ]
    once = np.ones((1, num_examples))
    value = float(np.mean([metric_on(run, metric, once) for run in runs]))
    return Scores(value=value, resampled=np.concatenate(chunks))


def difference(scores: Scores, reference: Scores) -> Difference:
    """How much more a method scores than the reference."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(scores.resampled - reference.resampled, (tail, 1 - tail))
    return Difference(value=scores.value - reference.value, low=float(low), high=float(high))


def resamples(num_examples: int, num_resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """[b, n] how often each example was drawn, a part of the resamples at a time."""
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // num_examples)
    for start in range(0, num_resamples, size):
        count = min(size, num_resamples - start)
        drawn = rng.integers(num_examples, size=(count, num_examples))
        drawn += np.arange(count)[:, None] * num_examples
        yield (
            np.bincount(drawn.ravel(), minlength=count * num_examples)
            .reshape(count, num_examples)
            .astype(np.float64)
        )


def refuse_other_examples(runs: Sequence[Predictions]) -> None:
    """Refuse runs that were not scored on the same examples.

    Raises:
        ValueError: they were not.
    """
    for run in runs:
        if run.ids != runs[0].ids or run.references != runs[0].references:
            raise ValueError("the runs were not scored on the same examples.")
