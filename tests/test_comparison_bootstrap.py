"""Metrics on resamples against scikit-learn and scipy, and the paired bootstrap against numpy."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.comparison.bootstrap import (
    Scores,
    difference,
    refuse_other_examples,
    resample_scores,
    resamples,
)
from launch.comparison.metrics import METRICS, is_correlation, is_loss, metric_on
from launch.comparison.results import Predictions

sklearn_metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")

ORACLES: dict[str, Any] = {
    "matthews_correlation": sklearn_metrics.matthews_corrcoef,
    "f1": lambda y, p: sklearn_metrics.f1_score(y, p, zero_division=0),
    "f1_macro": lambda y, p: sklearn_metrics.f1_score(y, p, average="macro", zero_division=0),
    "pearson": lambda y, p: stats.pearsonr(y, p).statistic,
    "spearman": lambda y, p: stats.spearmanr(y, p).statistic,
}


def predictions_of(correct: Any, predictions: Any = None, references: Any = None) -> Predictions:
    nothing = [None] * len(correct)
    return Predictions(
        ids=list(range(len(correct))),
        correct=np.asarray(correct, dtype=np.float64),
        predictions=list(predictions if predictions is not None else nothing),
        references=list(references if references is not None else nothing),
    )


@st.composite
def labelled(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> tuple[list, list, list[int]]:
    size = draw(st.integers(2, 20))
    sides = [draw(st.lists(values, min_size=size, max_size=size)) for _ in range(2)]
    counts = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size).filter(any))
    return sides[0], sides[1], counts


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("matthews_correlation", st.integers(0, 3)),
        ("f1", st.integers(0, 1)),
        ("f1_macro", st.integers(0, 3)),
        ("pearson", st.integers(-5, 5)),
        ("spearman", st.integers(-5, 5)),
    ],
)
@given(data=st.data())
def test_a_weighted_metric_is_that_of_the_repeated_examples(
    name: str, values: st.SearchStrategy[int], data: st.DataObject
) -> None:
    truth, guess, counts = data.draw(labelled(values))
    weights = np.array([counts, [1] * len(counts)], dtype=np.float64)
    found = metric_on(predictions_of([0] * len(truth), guess, truth), name, weights)
    for value, times in zip(found, (counts, [1] * len(counts)), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constant input
            repeated = (np.repeat(truth, times), np.repeat(guess, times))
            expected = ORACLES[name](*repeated) if len(repeated[0]) > 1 else value
        assert value == pytest.approx(0.0 if np.isnan(expected) else expected, abs=1e-9)


def test_labels_may_be_texts() -> None:
    truth, guess = ["yes", "no", "maybe", "no"], ["yes", "no", "no", "yes"]
    found = metric_on(predictions_of([0] * 4, guess, truth), "mcc", np.ones((1, 4)))
    assert found[0] == pytest.approx(sklearn_metrics.matthews_corrcoef(truth, guess))


def test_an_unknown_metric_is_the_share_of_right_answers() -> None:
    run = predictions_of([1, 0, 0.5])
    assert metric_on(run, "exact_match", np.array([[1.0, 1, 2]]))[0] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="neither right nor wrong"):
        metric_on(predictions_of([1, np.nan]), "exact_match", np.ones((1, 2)))
    with pytest.raises(ValueError, match="the labels 0 and 1"):
        metric_on(predictions_of([1, 1], ["a", "b"], ["a", "b"]), "f1", np.ones((1, 2)))


def test_names_tell_how_a_metric_is_read() -> None:
    assert is_loss("eval_loss")
    assert not is_loss("accuracy")
    assert is_correlation("matthews_correlation")
    assert not is_correlation("f1")
    assert METRICS.keys() >= ORACLES.keys()


def test_resamples_draw_as_many_examples_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(resamples(50, 400)))
    assert whole.shape == (400, 50)
    assert (whole.sum(axis=1) == 50).all()
    assert abs(whole.mean(axis=0) - 1).max() < 0.25
    monkeypatch.setattr("launch.comparison.bootstrap._CHUNK", 50 * 30)
    assert np.array_equal(np.concatenate(list(resamples(50, 400))), whole)  # memory changes nothing


def test_identical_methods_do_not_differ() -> None:
    runs = [predictions_of(np.random.default_rng(s).random(80) < 0.6) for s in range(3)]
    found = difference(resample_scores(runs, "accuracy"), resample_scores(runs, "accuracy"))
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert not found.is_real


def test_a_large_gap_is_real_and_a_small_one_is_not() -> None:
    base = np.arange(200) < 100
    better, alike = base.copy(), base.copy()
    better[100:150] = True
    alike[[0, 100, 101]] = [False, True, True]  # one right answer more, of two that differ
    scores = {
        name: resample_scores([predictions_of(correct)], "accuracy")
        for name, correct in (("base", base), ("better", better), ("alike", alike))
    }
    found = difference(scores["better"], scores["base"])
    assert found.value == pytest.approx(0.25)
    assert found.is_real
    assert not difference(scores["alike"], scores["base"]).is_real
    assert difference(scores["base"], scores["better"]).is_real


def test_the_interval_is_that_of_a_direct_simulation() -> None:
    rng = np.random.default_rng(5)
    first, second = (rng.random((3, 150)) < share for share in (0.7, 0.6))
    found = difference(
        *(
            resample_scores([predictions_of(c) for c in runs], "accuracy")
            for runs in (first, second)
        )
    )
    simulated = []
    for _ in range(5000):
        drawn = rng.integers(150, size=150)
        simulated.append(
            np.mean([a[drawn].mean() - b[drawn].mean() for a, b in zip(first, second, strict=True)])
        )
    low, high = np.quantile(simulated, [0.025, 0.975])
    assert found.value == pytest.approx(first.mean() - second.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.006)


def test_the_interval_of_a_correlation_is_that_of_a_direct_simulation() -> None:
    rng = np.random.default_rng(6)
    truth = rng.integers(2, size=120)
    runs = [np.where(rng.random(120) < right, truth, 1 - truth) for right in (0.85, 0.65)]
    found = difference(
        *(resample_scores([predictions_of([0] * 120, g, truth)], "matthews") for g in runs)
    )
    simulated = []
    for _ in range(1500):
        drawn = rng.integers(120, size=120)
        first, second = (
            sklearn_metrics.matthews_corrcoef(truth[drawn], guess[drawn]) for guess in runs
        )
        simulated.append(first - second)
    low, high = np.quantile(simulated, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)


def test_other_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="not scored on the same examples"):
        refuse_other_examples([predictions_of([1, 0]), predictions_of([1, 0, 1])])


def test_a_difference_is_real_when_zero_lies_outside() -> None:
    below = Scores(value=0.0, resampled=np.array([-2.0, -1.0]))
    zero = Scores(value=0.0, resampled=np.zeros(2))
    assert difference(below, zero).is_real
    assert not difference(Scores(value=0.0, resampled=np.array([-1.0, 1.0])), zero).is_real
