"""Metrics on resamples against those of eval, and the paired bootstrap against a plain loop."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gem_ds.comparison.bootstrap import (
    METRICS,
    Interval,
    interval,
    metric_on,
    resample_scores,
    resamples,
)
from gem_ds.comparison.results import Predictions
from gem_ds.data.metrics import METRICS as EVAL_METRICS
from gem_ds.data.metrics import Measure
from gem_ds.data.tasks import NumberExample
from tests.tiny_tasks import choice

#: By the name of a task's main metric, what eval scores that task with.
ORACLES: dict[str, Measure] = dict(next(iter(m.items())) for m in EVAL_METRICS.values())


def predictions_of(correct: Any, predictions: Any = (), references: Any = ()) -> Predictions:
    return Predictions(
        ids=list(range(len(correct))),
        correct=np.asarray(correct, dtype=np.float64),
        predictions=list(predictions),
        references=list(references),
    )


def example_of(metric: str, truth: int) -> Any:
    if metric == "pearson":
        return NumberExample(prompt="", target="", pairs=(), value=float(truth))
    return choice("", tuple("0123"), truth)


def difference(first: Any, second: Any, metric: str = "accuracy") -> Interval:
    """Of two methods, each a list of the runs of its seeds."""
    return interval(resample_scores(first, metric) - resample_scores(second, metric))


@pytest.mark.parametrize(
    ("name", "low", "high"), [("matthews_correlation", 0, 3), ("f1a", 0, 1), ("pearson", -5, 5)]
)
@given(data=st.data())
def test_a_weighted_metric_is_that_of_the_repeated_examples(name, low, high, data):
    values = st.integers(low, high)
    triples = st.lists(st.tuples(values, values, st.integers(0, 3)), min_size=2, max_size=20)
    drawn = data.draw(triples.filter(lambda rows: any(count for *_, count in rows)))
    truth, guess, counts = zip(*drawn, strict=True)
    weightings = (counts, [1] * len(counts))
    run = predictions_of(counts, guess, truth)
    found = metric_on(run, name, np.array(weightings, dtype=np.float64))
    for value, times in zip(found, weightings, strict=True):
        examples = [example_of(name, int(t)) for t in np.repeat(truth, times)]
        expected = ORACLES[name](examples, np.repeat(guess, times).tolist())
        assert value == pytest.approx(expected, abs=1e-9)


def test_every_main_metric_is_known_or_the_share_of_right_answers():
    # Under another name a correlation would silently be compared as the share of right answers.
    assert METRICS.keys() == ORACLES.keys() - {"accuracy", "f1"}
    run = predictions_of([1, 0, 0.5])
    assert metric_on(run, "exact_match", np.array([[1.0, 1, 2]]))[0] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="neither right nor wrong"):
        metric_on(predictions_of([1, np.nan]), "exact_match", np.ones((1, 2)))


def test_resamples_draw_as_many_seeds_and_examples_as_there_are(monkeypatch):
    def drawn() -> list[np.ndarray]:
        return [np.concatenate(part) for part in zip(*resamples(3, 50, 400), strict=True)]

    whole = drawn()
    for counts, size in zip(whole, (3, 50), strict=True):
        assert counts.shape == (400, size)
        assert (counts.sum(axis=1) == size).all()
        assert abs(counts.mean(axis=0) - 1).max() < 0.25
    monkeypatch.setattr("gem_ds.comparison.bootstrap._CHUNK", 50 * 30)
    for counts, again in zip(whole, drawn(), strict=True):
        assert np.array_equal(counts, again)  # memory changes nothing


def test_identical_methods_do_not_differ():
    runs = [predictions_of(np.random.default_rng(s).random(80) < 0.6) for s in range(3)]
    found = difference(runs, runs)
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert not found.is_real


def test_a_large_gap_is_real_and_a_small_one_or_that_of_one_seed_is_not():
    first = np.arange(200) < 100
    alike = first.copy()
    alike[[0, 100, 101]] = [False, True, True]  # one right answer more, of two that differ
    base, better = predictions_of(first), predictions_of(np.arange(200) < 160)
    assert difference([better], [base]).is_real
    assert difference([base], [better]).is_real
    assert not difference([predictions_of(alike)], [base]).is_real
    # With other seeds a gain of one in three may well not be seen.
    assert not difference([better, base, base], [base] * 3).is_real


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_the_interval_is_that_of_a_direct_simulation(num_seeds):
    # Right answers by [seed, example]; what a seed does to both methods alike must cancel out.
    rng = np.random.default_rng(5)
    luck = np.array([-0.15, 0.0, 0.15])[:num_seeds, None]
    own = np.array([0.0, 0.1, -0.1])[:num_seeds, None]
    first = rng.random((num_seeds, 150)) < 0.7 + luck + own
    second = rng.random((num_seeds, 150)) < 0.6 + luck
    found = difference(*([predictions_of(c) for c in runs] for runs in (first, second)))
    simulated = []
    for _ in range(5000):
        seeds, examples = rng.integers(num_seeds, size=num_seeds), rng.integers(150, size=150)
        drawn = np.ix_(seeds, examples)
        simulated.append(first[drawn].mean() - second[drawn].mean())
    low, high = np.quantile(simulated, [0.025, 0.975])
    assert found.value == pytest.approx(first.mean() - second.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
