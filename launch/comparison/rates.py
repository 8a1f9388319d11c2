"""The learning rate of each method: the best on the development split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launch.comparison.cells import Cell, search_cells
from launch.comparison.grid import Comparison
from launch.comparison.metrics import is_loss
from launch.comparison.results import read_result


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
    results = {}
    for cell in search_cells(comparison):
        try:
            results[cell] = read_result(comparison, cell)
        except ValueError:
            continue
    choices = {}
    for task in comparison.tasks:
        for name, method in comparison.methods.items():
            own = {
                cell: r for cell, r in results.items() if (cell.task, cell.method) == (task, name)
            }
            metric = next((result.metric for result in own.values()), None)
            scores = _scores(method.learning_rates, {c: r.score for c, r in own.items()})
            rate = best_rate(method.learning_rates, scores, metric or "")
            if len(method.learning_rates) == 1:
                rate = method.learning_rates[0]
            choices[task, name] = Choice(
                rates=method.learning_rates, scores=scores, metric=metric, rate=rate
            )
    return choices


def best_rate(
    rates: tuple[float, ...], scores: tuple[float | None, ...], metric: str
) -> float | None:
    """The rate of the best score, of equal ones the smallest; None if no rate has a score."""
    sign = -1 if is_loss(metric) else 1
    scored = [(r, sign * s) for r, s in zip(rates, scores, strict=True) if s is not None]
    return min(scored, key=lambda pair: (-pair[1], pair[0]))[0] if scored else None


def _scores(rates: tuple[float, ...], by_cell: Mapping[Cell, float]) -> tuple[float | None, ...]:
    """In the order of the rates."""
    by_rate = {cell.learning_rate: score for cell, score in by_cell.items()}
    return tuple(by_rate.get(rate) for rate in rates)
