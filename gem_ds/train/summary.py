"""What a selection looks like, for people: where the budget went, and what is trained."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from torch import Tensor

#: A selected weight below this is reported as nearly zero (a pretrained weight is about 0.02).
NEARLY_ZERO = 1e-4


def budget_table(rows: Iterable[tuple[str, int, int, float]]) -> str:
    """Where the budget went, a line per layer."""
    rows = list(rows)
    total = sum(budget for _, _, budget, _ in rows)
    width = max(len(name) for name, *_ in rows)
    lines = [
        f"{'weight':<{width}}  {'entries':>12}  {'selected':>10}  {'density':>8}"
        f"  {'of budget':>9}  score"
    ]
    for name, numel, budget, score in rows:
        lines.append(
            f"{name:<{width}}  {numel:>12,}  {budget:>10,}  {budget / numel:>8.3%}"
            f"  {budget / total:>9.2%}  {score:.3e}"
        )
    numels = sum(numel for _, numel, _, _ in rows)
    lines.append(
        f"{'all targets':<{width}}  {numels:>12,}  {total:>10,}  {total / numels:>8.3%}  {1:>9.2%}"
    )
    return "\n".join(lines)


def effective_layers(budgets: Iterable[int]) -> float:
    """Over how many layers a budget is spread: the exponential of the entropy of its shares.

    Equal shares of L layers give L, everything in one layer gives 1.
    """
    positive = [budget for budget in budgets if budget]
    total = sum(positive)
    return math.exp(-sum(b / total * math.log(b / total) for b in positive))


def selection_shape(budgets: Iterable[int], base: Tensor) -> dict[str, float]:
    """How concentrated the budget is, and how many of the selected weights are nearly zero."""
    return {
        "effective_layers": effective_layers(budgets),
        "selected_near_zero": int((base.float().abs() < NEARLY_ZERO).sum()),
    }


def kernel_counts(kernels: Iterable[str]) -> str:
    """Which kernels serve how many layers: ``library (30 layers), gather (2)``."""
    (first, count), *others = Counter(kernels).most_common()
    text = f"{first} ({count} layer{'s' * (count > 1)})"
    return ", ".join([text, *(f"{kernel} ({count})" for kernel, count in others)])


def changed_share(values: Tensor, base: Tensor) -> float:
    """Share of the selected weights that differ from the base: both [K], in the model's dtype."""
    return (values != base).double().mean().item()
