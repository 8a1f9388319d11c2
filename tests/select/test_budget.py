"""Budgets: against the oracle, and the properties that a fair share must have."""

import math
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.select.budget import allocate_budget, total_budget
from tests import oracle

# Few distinct scores, so that ties and zeros are common, beside any others.
SCORES = st.one_of(
    st.sampled_from([0.0, 1.0, 2.0, 0.5]),
    st.floats(min_value=0, allow_nan=False, allow_infinity=False),
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], list[int], int]:
    layers = draw(st.lists(st.tuples(SCORES, st.integers(1, 60)), min_size=1, max_size=8))
    scores, sizes = [s for s, _ in layers], [n for _, n in layers]
    return scores, sizes, draw(st.integers(0, sum(sizes)))


@settings(max_examples=400, deadline=None)
@given(problems())
def test_budgets_are_the_oracles_and_fair(problem):
    scores, sizes, total = problem
    found = allocate_budget(scores, sizes, total)
    assert found == oracle.budgets(scores, sizes, total)
    assert sum(found) == total
    assert all(0 <= k <= n for k, n in zip(found, sizes, strict=True))
    for s, n, k in zip(scores, sizes, found, strict=True):
        for other_s, other_k in zip(scores, found, strict=True):
            if s > other_s:  # a higher score never gets less, unless the layer is full
                assert k >= min(other_k, n)


@pytest.mark.parametrize(
    ("scores", "sizes", "total", "expected"),
    [
        ([1.0, 1.0, 2.0], [100, 100, 100], 40, [10, 10, 20]),
        ([1.0, 1.0, 1.0], [100, 100, 100], 10, [4, 3, 3]),  # a tie goes to the first
        ([1.0, 2.0, 4.0], [100, 100, 100], 10, [1, 3, 6]),  # 1.43 2.86 5.71: remainders .86 .71
        ([8.0, 1.0, 1.0], [4, 100, 100], 10, [4, 3, 3]),  # the first fills up
        ([8.0, 4.0, 1.0], [2, 6, 100], 12, [2, 6, 4]),  # the second fills up a round later
        ([0.0, 0.0], [30, 10], 8, [6, 2]),  # no scores: by size
        ([5.0, 0.0, 0.0], [4, 30, 10], 12, [4, 6, 2]),  # no scores left: by size
        ([0.0, 3.0], [10, 10], 10, [0, 10]),
        ([1.0, 1e-300], [10, 10], 20, [10, 10]),
        ([1.0], [7], 1, [1]),
        ([1.0, 2.0], [5, 5], 0, [0, 0]),
    ],
)
def test_shares_worked_out_by_hand(scores, sizes, total, expected):
    assert allocate_budget(scores, sizes, total) == expected


@pytest.mark.parametrize(
    ("density", "num_parameters", "expected"),
    [
        (0.29, 100, 29),  # int(0.29 * 100) is 28
        ("0.29", 100, 29),
        (0.07, 100, 7),
        (0.57, 100, 57),
        (0.001, 6_738_415_616, 6_738_415),
        (1, 12345, 12345),
        (1e-3, 1000, 1),
        ("1e-3", 1999, 1),
        (Decimal("0.0000000001"), 10**10, 1),
        (
            "0.333333333333333333333333333333333333333",
            3 * 10**39,
            999999999999999999999999999999999999999,
        ),
    ],
)
def test_total_is_the_floor_of_the_decimal_product(density, num_parameters, expected):
    assert total_budget(density, num_parameters) == expected


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 10**12))
def test_total_agrees_with_integer_arithmetic(millionths, num_parameters):
    density = millionths / 10**6
    expected = millionths * num_parameters // 10**6
    if expected == 0:
        with pytest.raises(ValueError, match=f"selects none .* raise it to 1/{num_parameters}"):
            total_budget(density, num_parameters)
    else:
        assert total_budget(density, num_parameters) == expected


@pytest.mark.parametrize(
    "density", [0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf, -math.inf, "many", "", "nan", "0"]
)
def test_a_density_outside_0_to_1_is_refused(density):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        total_budget(density, 1000)
