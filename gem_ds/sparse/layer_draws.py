"""Which layers a step trains: drawn by a bandit that goes by the norms of their gradients.

Of n layers that have trained entries one is drawn with its probability p, by itself; sum(p) =
share n, and p = share at first; of others p = 0. After a step, for the drawn layers D and the norms
g of their gradients:

    loss_l = max((g_j / p_j)^2 over D) - (g_l / p_l)^2                         importance weighted
    v_l    = p_l exp(-rate loss_l / p_l) for l in D, p_l for the others        EXP3's update
    p      = c v, but 1 where that is above 1, for the c that keeps sum(p)

as Sparse-Layer SAM does it (Cheng et al., arXiv 2602.09395), in the form and with the constants of
the authors' published code. A layer there is any parameter tensor, here a target matrix.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

#: How fast probabilities move, and what they never fall below, lest a layer be lost.
RATE, LEAST = 1e-3, 1e-8


class LayerDraws:
    """The probabilities of layers, and how often each has been updated: lists that it keeps up.

    They are all that a resumed run needs. Draws are a function of the seed, the step and the
    probabilities, so that ranks agree without a word.
    """

    def __init__(
        self, probabilities: list[float], num_updates: list[int], share: float, seed: int
    ) -> None:
        self.probabilities, self.num_updates = probabilities, num_updates
        self.share, self.seed = share, seed

    def draw(self, step: int) -> list[bool]:
        """Which layers are drawn for a step; at least one is."""
        noise = random.Random(f"{self.seed}/{step}")
        while not any(drawn := [noise.random() < p for p in self.probabilities]):
            pass
        return drawn

    def update(self, drawn: Sequence[bool], norms: Sequence[float]) -> None:
        """Learn from a step that was applied; ``norms`` are per layer, of drawn ones alone read.

        Of one whose norms are not finite nothing can be learnt.
        """
        gains = {i: (norms[i] / self.probabilities[i]) ** 2 for i in range(len(drawn)) if drawn[i]}
        for i in gains:
            self.num_updates[i] += 1
        if not all(map(math.isfinite, gains.values())):
            return
        largest = max(gains.values())
        total = self.share * sum(p > 0 for p in self.probabilities)
        weights = list(self.probabilities)
        for i, gain in gains.items():
            weights[i] *= math.exp(-RATE * (largest - gain) / weights[i])
        shares = zip(self.probabilities, capped(weights, total), strict=True)
        self.probabilities[:] = [max(p, LEAST) if before else 0.0 for before, p in shares]


def capped(weights: Sequence[float], total: float) -> list[float]:
    """The weights times the number with which they sum to ``total``, none of them above 1."""
    shares = [1.0] * len(weights)
    rest = sum(weights)
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    for number, i in enumerate(order):
        if weights[i] * total <= rest:
            for j in order[number:]:
                shares[j] = weights[j] * total / rest
            break
        total, rest = total - 1.0, rest - weights[i]
    return shares
