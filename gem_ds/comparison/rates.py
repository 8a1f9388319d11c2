"""The learning rate of each method: the best on the development split."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from gem_ds.comparison.cells import search_cells
from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.metrics import is_loss
from gem_ds.comparison.results import Result, read_result


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the search has found for a task and a method.

    Attributes:
        rates: ascending.
        scores: of the rates on the development split; None of one that failed or was not needed.
        metric: what they are; None where no run has come to its end.
        rate: the best; None where there is none.
    """

    rates: tuple[float, ...]
    scores: tuple[float | None, ...]
    metric: str | None
    rate: float | None

    @property
    def is_at_edge(self) -> bool:
        """Whether a rate beyond the grid may be better."""
        return len(self.rates) > 1 and self.rate in (self.rates[0], self.rates[-1])

    @property
    def score(self) -> float | None:
        """That of the best rate on the development split."""
        return None if self.rate is None else self.scores[self.rates.index(self.rate)]


def choose_rates(comparison: Comparison) -> dict[tuple[str, str], Choice]:
    """The choice of every task and method, from the finished runs of the search."""
    found: dict[tuple[str, str], dict[float, Result]] = {
        (task, method): {} for task in comparison.tasks for method in comparison.methods
    }
    for cell in search_cells(comparison):
        with suppress(ValueError):
            result = read_result(comparison, cell)
            found[cell.task, cell.method][cell.learning_rate] = result
    choices = {}
    for (task, name), results in found.items():
        rates = comparison.methods[name].learning_rates
        choices[task, name] = Choice(
            rates=rates,
            scores=tuple(results[rate].score if rate in results else None for rate in rates),
            metric=next((result.metric for result in results.values()), None),
            rate=rates[0] if len(rates) == 1 else best_rate(results),
        )
    return choices


def best_rate(results: Mapping[float, Result]) -> float | None:
    """The rate of the best score; of equal ones that of the least loss, then the smallest.

    A score such as the share of right answers is often the same to the last digit where nothing has
    been learnt yet, and the loss is not.

    Args:
        results: by learning rate.

    Returns:
        A key of ``results``; None if there are none.
    """

    def badness(rate: float) -> tuple[float, float, float]:
        result = results[rate]
        return (result.score if is_loss(result.metric) else -result.score, result.loss, rate)

    return min(results, key=badness, default=None)
