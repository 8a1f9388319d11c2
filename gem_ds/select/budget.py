"""From layer scores to integer budgets, in exact arithmetic.

K entries in total are shared among the layers in proportion to their scores s_l, no layer getting
more than its n_l entries. Fractions of integers leave no rounding to chance: the same scores give
the same budgets on every rank and machine, and the budgets sum to K exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction


def total_budget(density: float | str | Decimal, num_parameters: int) -> int:
    """K, the number of entries to train, at least 1: ``floor(density * num_parameters)``.

    The product is taken of the decimal number that the user wrote: 0.29 of 100 entries are 29,
    while the binary fraction nearest to 0.29 would give 28.
    """
    try:
        share = Decimal(str(density))
    except InvalidOperation:
        share = Decimal("NaN")
    if share.is_nan() or not 0 < share <= 1:
        raise ValueError(
            f"The density is {density}: give the share of the parameters to train, a number above "
            "0 and at most 1, such as 0.001."
        )
    total = math.floor(Fraction(share) * num_parameters)
    if total == 0:
        raise ValueError(
            f"A density of {density} selects none of the model's {num_parameters} parameters: "
            f"raise it to 1/{num_parameters} or more."
        )
    return total


def allocate_budget(scores: Sequence[float], sizes: Sequence[int], budget: int) -> list[int]:
    """Share ``budget`` entries among the layers in proportion to their scores: per layer k_l.

    A layer whose ideal share reaches its size n_l gets all its entries and leaves; the others share
    what remains, and so on. Those still there get the floors of their ideal shares, and what is
    left over goes to the largest remainders, one entry each, ties in the order of the layers.
    When no remaining layer has a score, their sizes stand in for the scores.
    """
    assert 0 <= budget <= sum(sizes), "the matrices hold the budget"
    assert all(math.isfinite(score) and score >= 0 for score in scores), "scores can be shares"
    budgets = list(sizes)
    remaining = list(range(len(sizes)))
    left = budget
    while remaining:
        shares = _ideal_shares([scores[i] for i in remaining], [sizes[i] for i in remaining], left)
        open_layers = [i for i, share in zip(remaining, shares, strict=True) if share < sizes[i]]
        if len(open_layers) == len(remaining):
            for i, share in zip(remaining, _round_to_sum(shares, left), strict=True):
                budgets[i] = share
            break
        left -= sum(sizes[i] for i in remaining) - sum(sizes[i] for i in open_layers)
        remaining = open_layers
    assert sum(budgets) == budget, "budgets sum to K"
    return budgets


def fill_in_order(scores: Sequence[float], sizes: Sequence[int], budget: int) -> list[int]:
    """Give ``budget`` entries to whole layers, of the highest score first: per layer k_l.

    Ties go to the earlier layer. The last one to get any may get a part.
    """
    budgets = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -scores[i]):
        budgets[i] = min(sizes[i], budget)
        budget -= budgets[i]
    assert budget == 0, "the matrices hold the budget"
    return budgets


def _ideal_shares(scores: Sequence[float], sizes: Sequence[int], budget: int) -> list[Fraction]:
    """``budget`` in exact proportion to the scores, or to the sizes if all scores are 0."""
    weights = [Fraction(w) for w in (scores if any(scores) else sizes)]
    unit = Fraction(budget) / (sum(weights) or 1)
    return [weight * unit for weight in weights]


def _round_to_sum(shares: Sequence[Fraction], budget: int) -> list[int]:
    """Floors, plus one for the largest remainders (the first of equals) until ``budget`` is met."""
    floors = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: floors[i] - shares[i])
    for i in by_remainder[: budget - sum(floors)]:
        floors[i] += 1
    return floors
