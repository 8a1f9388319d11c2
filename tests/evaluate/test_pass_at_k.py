"""pass@k against a count over all draws, the published estimator, and a bootstrap with a loop."""

import json
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from gem_ds.evaluate.pass_at_k import (
    bootstrap_interval,
    mean_pass_at_k,
    pass_at_k,
    results_of,
    summary,
)
from tests.tiny_evaluation import REFUSED, refusal


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


@pytest.mark.parametrize(("numbers", "message"), REFUSED["pass_at_k"])
def test_what_has_no_value_is_refused(numbers, message):
    assert message in refusal(pass_at_k, *numbers)


def counts(*pairs: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return {f"mbpp/{i}": pair for i, pair in enumerate(pairs, 11)}


def test_problems_nobody_tried_count_as_zero():
    """A denominator of tried problems would reward a run that gave up on the hard ones."""
    assert mean_pass_at_k(counts((2, 2), (0, 0), (2, 2), (0, 0)), 1)[0] == 0.5


@pytest.mark.parametrize(
    ("pairs", "k", "message"),
    [
        ([(4, 1), (3, 3)], 4, "mbpp/12 has 3 samples and pass@4 needs at least 4"),
        ([], 1, "no problems"),
    ],
)
def test_too_few_samples_or_problems_are_an_error(pairs, k, message):
    assert message in refusal(mean_pass_at_k, counts(*pairs), k)


def by_a_loop(values: list[float], seed: int, num_resamples: int) -> tuple[float, float]:
    """The bootstrap as it is told: draw problems with replacement, take the mean, repeat."""
    rng = np.random.default_rng(seed)
    means = [np.mean(rng.choice(values, len(values))) for _ in range(num_resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return low, high


@pytest.mark.parametrize(
    "values",
    [[0.0] * 60 + [1.0] * 40, [i / 10 for i in range(11)] * 7, [0.0] * 99 + [1.0], [0.25]],
)
def test_the_interval_is_that_of_a_loop_over_resamples(values):
    low, high = bootstrap_interval(values, seed=1)
    expected_low, expected_high = by_a_loop(values, seed=2, num_resamples=4000)
    noise = 0.25 * np.std(values) / len(values) ** 0.5 + 1e-12
    steps = 1 / len(values) if len(set(values)) > 1 else 0  # means of counts move in steps
    assert low == pytest.approx(expected_low, abs=max(noise, steps))
    assert high == pytest.approx(expected_high, abs=max(noise, steps))


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


IDS = ["mbpp/11", "mbpp/12", "mbpp/13"]


def verdicts(*judged: tuple[int, str], **more) -> list[dict]:
    entries = [{"task_id": f"mbpp/{i}", "status": status, "in_jail": False} for i, status in judged]
    return [entry | more for entry in entries]


def test_results_count_every_problem_and_every_status():
    entries = verdicts((11, "passed"), (11, "failed"), (13, "timeout"), (13, "crashed"))
    results = results_of(entries, IDS, [1, 2], isolation="box")
    assert results["scores"]["pass@1"]["score"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert results["scores"]["pass@2"]["score"] == pytest.approx((1 + 0 + 0) / 3)
    low, high = results["scores"]["pass@2"]["confidence_interval"]
    assert 0 <= low <= 1 / 3 <= high <= 1
    assert results["num_problems"] == 3
    assert results["without_samples"] == ["mbpp/12"]
    assert results["verdicts"] == {"passed": 1, "failed": 1, "timeout": 1, "crashed": 1}
    assert (results["n"], results["k"], results["isolation"]) == (2, [1, 2], "box")
    assert json.loads(json.dumps(results)) == results
    told = refusal(results_of, entries, IDS, [3], isolation="box")
    assert told.startswith("mbpp/11 has 2 samples and pass@3 needs")


def test_verdicts_that_could_be_forged_are_counted_and_told():
    entries = verdicts((11, "passed"), (11, "failed"), in_jail=True) + verdicts((11, "passed"))
    results = results_of(entries, IDS[:1], [1], isolation="box")
    assert results["tested_in_jail"] == {"samples": 2, "passed": 1}
    assert summary(results).split("\n")[2].startswith("of those that passed, 1 had a say")


def test_the_summary_says_what_was_counted_and_cuts_a_long_list_of_problems():
    entries = verdicts((11, "passed"), (13, "passed"))
    first, second, third = summary(results_of(entries, IDS, [1], isolation="box")).split("\n")
    assert first.startswith("pass@1 = 66.7 % (")
    assert first.endswith(" on 3 problems, n = 1")
    assert second == "programs: 2 passed, 0 failed, 0 timeout, 0 crashed; isolation: box"
    assert third == "without samples, counted as zero: mbpp/12"
    ids = [f"mbpp/{i}" for i in range(11, 31)]
    results = results_of(entries[:1], ids, [1], isolation="box")
    assert results["without_samples"] == ids[1:]
    assert summary(results).endswith(
        "\nwithout samples, counted as zero: "
        "mbpp/12, mbpp/13, mbpp/14, mbpp/15, mbpp/16 and 14 more"
    )
