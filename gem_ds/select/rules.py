"""The rules by which entries can be chosen: one table.

A rule is an entry of :data:`RULES`, and nothing else has to be edited for a new one:

* ``entry_score``: within a matrix, the entries of the highest score are trained;
* ``layer_score``: how many of each matrix follows from it; None takes the largest entry scores of
  all matrices together;
* ``share``: how K is shared by the layer scores, in proportion to them or in their order;
* ``statistic``: what calibration sums over the examples, each one's gradient g_e, its |g_e| or its
  g_e^2; None for a rule that looks at no gradient, so that there is no calibration;
* ``scales_rates``: whether the learning rate of a layer is in proportion to its score;
* ``help``: what the command line says of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from torch import Tensor

from gem_ds.select import scores
from gem_ds.select.budget import allocate_budget, fill_in_order
from gem_ds.select.shards import Group, Shards, TargetShard
from gem_ds.select.sums import largest_magnitudes

#: Of the damped ratio: what is added to |w|, in root mean squares of the weight.
DAMPING = 0.1

Statistic = Literal["sum", "magnitudes", "squares"]

EntryScore = Callable[[Shards, Group, int], list[Tensor]]
"""Takes this rank's shards, the ranks and a seed; per shard fp32 [m], non-negative."""

LayerScore = Callable[[Sequence[Tensor], Shards, Group], list[float]]
"""Takes this rank's entry scores, the shards and the ranks; per layer a number."""

Share = Callable[[Sequence[float], Sequence[int], int], list[int]]
"""Takes the layers' scores, their sizes and K; per layer how many entries it trains, K in all."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A way to choose entries; the module's docstring tells of the attributes."""

    entry_score: EntryScore
    layer_score: LayerScore | None
    help: str
    share: Share = allocate_budget
    statistic: Statistic | None = "sum"
    scales_rates: bool = False

    @property
    def is_by_example(self) -> bool:
        """Whether the gradients of the examples have to be told from each other."""
        return self.statistic in ("magnitudes", "squares")


# Entry scores


def by_itself(score: Callable[[TargetShard], Tensor]) -> EntryScore:
    """The entry score of a shard that needs to know of no other."""
    return lambda shards, group, seed: [score(shard) for shard in shards]


def by_chance(score: Callable[[TargetShard, int], Tensor]) -> EntryScore:
    """The same of one that draws, by the seed."""
    return lambda shards, group, seed: [score(shard, seed) for shard in shards]


def _damped_ratio(shards: Shards, group: Group, seed: int) -> list[Tensor]:
    return [
        scores.ratio(shard, max(DAMPING * scale, scores.EPSILON))  # finite in a matrix of zeros too
        for shard, scale in zip(shards, scores.root_mean_squares(shards, group), strict=True)
    ]


_ratio = by_itself(scores.ratio)
_gradient = by_itself(scores.gradient_magnitude)
_weight = by_itself(scores.weight_magnitude)
_chance = by_chance(scores.chance)
_drawn = by_chance(scores.drawn_by_gradient)

# Layer scores


def by_statistics(score: Callable[[scores.LayerStatistics], float]) -> LayerScore:
    """The layer score that follows from what its entries' scores are like."""
    return lambda values, shards, group: [
        score(statistics) for statistics in scores.layer_statistics(values, shards, group)
    ]


def by_shape(score: Callable[[tuple[int, ...]], int]) -> LayerScore:
    """The layer score that follows from the matrix' shape; 0 where no entry has a score.

    That is an expert's to which no example was routed.
    """

    def layer_scores(values: Sequence[Tensor], shards: Shards, group: Group) -> list[float]:
        peaks = largest_magnitudes(values, shards, group)
        return [score(s.shape) * float(peak > 0) for s, peak in zip(shards, peaks, strict=True)]

    return layer_scores


_norm_times_entropy = by_statistics(lambda s: s.norm * s.entropy)
_tempered = by_statistics(lambda s: math.sqrt(1 + s.norm * s.entropy))
# As a Decimal, since ranks on different machines may round math.exp differently.
_effective_entries = by_statistics(lambda s: float(Decimal(s.entropy).exp()) if s.total else 0.0)
_equal = by_shape(lambda shape: 1)
_rows_and_columns = by_shape(sum)


def _relative_norms(values: Sequence[Tensor], shards: Shards, group: Group) -> list[float]:
    """``||g|| / ||w||``; the values are |g|."""
    norms = [statistics.norm for statistics in scores.layer_statistics(values, shards, group)]
    of_weights = scores.weight_norms(shards, group)
    return [g / max(w, scores.EPSILON) for g, w in zip(norms, of_weights, strict=True)]


RULES = {
    "gem": Rule(
        entry_score=_ratio,
        layer_score=_norm_times_entropy,
        help="gradient relative to the weight, |g| / |w|, budgets by its norm times its entropy "
        "(arXiv 2508.16191)",
    ),
    "ratio": Rule(
        entry_score=_ratio,
        layer_score=_equal,
        help="as gem with equal budgets",
    ),
    "gradient": Rule(
        entry_score=_gradient,
        layer_score=_equal,
        help="|g| with equal budgets",
    ),
    "entropy_gradient": Rule(
        entry_score=_gradient,
        layer_score=_norm_times_entropy,
        help="|g|, budgets by its norm times its entropy",
    ),
    "magnitude": Rule(
        entry_score=_weight,
        layer_score=_equal,
        statistic=None,
        help="|w| with equal budgets",
    ),
    "random": Rule(
        entry_score=_chance,
        layer_score=_equal,
        statistic=None,
        help="by chance with equal budgets",
    ),
    "supertuning": Rule(
        entry_score=_weight,
        layer_score=None,
        statistic=None,
        help="the largest |w| of all layers together (arXiv 2607.09287)",
    ),
    "damped": Rule(
        entry_score=_damped_ratio,
        layer_score=_norm_times_entropy,
        help=f"as gem with |g| / (|w| + {DAMPING:g} rms(w)), so that weights next to 0 do not "
        "decide the budgets",
    ),
    "ratio_global": Rule(
        entry_score=_ratio,
        layer_score=None,
        help="the largest |g| / |w| of all layers together (compare GaLLoP, arXiv 2510.19778)",
    ),
    "tempered": Rule(
        entry_score=_ratio,
        layer_score=_tempered,
        help="as gem with budgets by exp(log1p(s) / T), s the norm times the entropy and T = 2: a "
        "choice of the published code",
    ),
    "effective": Rule(
        entry_score=_ratio,
        layer_score=_effective_entries,
        help="as gem with budgets by the effective number of entries, exp(entropy)",
    ),
    "random_shira": Rule(
        entry_score=_chance,
        layer_score=_rows_and_columns,
        statistic=None,
        help="by chance with budgets by rows plus columns, as shira's and lora's",
    ),
    "lift": Rule(
        entry_score=scores.principal_magnitudes,
        layer_score=_rows_and_columns,
        statistic=None,
        help=f"the largest entries of the part of w of rank {scores.PRINCIPAL_RANK}, budgets by "
        "rows plus columns, chosen once (arXiv 2506.00772, whose code chooses anew in training)",
    ),
    "gem_abs": Rule(
        entry_score=_ratio,
        layer_score=_norm_times_entropy,
        statistic="magnitudes",
        help="as gem with the sum of the examples' |g|, where the gradients of different examples "
        "do not cancel",
    ),
    "gradient_abs": Rule(
        entry_score=_gradient,
        layer_score=_equal,
        statistic="magnitudes",
        help="the sum of the examples' |g| with equal budgets",
    ),
    "drawn": Rule(
        entry_score=_drawn,
        layer_score=_equal,
        help="drawn by chance in proportion to |g|, with equal budgets: between gradient, which "
        "crowds into few rows and columns, and random",
    ),
    "fish": Rule(
        entry_score=_gradient,
        layer_score=None,
        statistic="squares",
        help="the largest sums of the examples' g^2 of all layers together, the empirical Fisher "
        "information (arXiv 2111.09839)",
    ),
    "surgical": Rule(
        entry_score=_gradient,
        layer_score=_relative_norms,
        share=fill_in_order,
        help="whole matrices, those of the largest ||g|| / ||w|| first, the last in part if the "
        "budget ends there; without --density all that --target_modules names (arXiv 2210.11466)",
    ),
    "auto_rgn": Rule(
        entry_score=_gradient,
        layer_score=_relative_norms,
        share=fill_in_order,
        scales_rates=True,
        help="all target matrices unless --density says less, each with the learning rate times "
        "its ||g|| / ||w|| over the largest (Auto-RGN, arXiv 2210.11466)",
    ),
}

SPARSE_METHODS = tuple(RULES)
CALIBRATED_METHODS = tuple(name for name, rule in RULES.items() if rule.statistic is not None)
