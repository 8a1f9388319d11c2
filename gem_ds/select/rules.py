"""The rules by which entries can be chosen: one table.

A rule is an entry of :data:`RULES`, and nothing else has to be edited for a new one:

* ``entry_score``: within a matrix, the entries of the highest score are trained;
* ``budgets``: how many of each matrix;
* ``needs_gradient``: whether it looks at gradients, so that there is a calibration;
* ``help``: what the command line says of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gem_ds.select.budget import allocate_budget
from gem_ds.select.scores import (
    EPSILON,
    Group,
    gradient_magnitude_,
    gradient_to_weight_ratio_,
    layer_statistics,
    random_scores,
    refuse_not_finite,
    root_mean_squares,
    weight_magnitude,
)
from gem_ds.select.topk import count_among_largest


@dataclass(frozen=True, kw_only=True)
class TargetShard:
    """This rank's range of one target matrix.

    Attributes:
        name: the parameter's name.
        numel: entries of the whole matrix.
        start: flat index of the range's first entry.
        weight: [m], any floating dtype.
        gradient: fp32 [m], the calibration gradient, which selection overwrites; None for rules
            that do not look at it.
        device: where scores are computed and reduced.
    """

    name: str
    numel: int
    start: int
    weight: Tensor
    gradient: Tensor | None
    device: torch.device


#: Of the damped ratio: what is added to |w|, in root mean squares of the weight.
DAMPING = 0.1

Shards = Sequence[TargetShard]

EntryScore = Callable[[Shards, Group, int], list[Tensor]]
"""Takes this rank's shards, the ranks and a seed; per shard fp32 [m], non-negative."""

LayerScore = Callable[[Sequence[Tensor], Shards, Group], list[float]]
"""Takes this rank's entry scores, the shards and the ranks; per layer a number."""

Budgets = Callable[[Sequence[Tensor], Shards, int, Group], tuple[list[int], list[float]]]
"""Takes this rank's entry scores, the shards, K and the ranks; per layer how many entries it
trains, K in all, and the number that this follows from. Raises ValueError on every rank alike where
a score is not finite."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A way to choose entries; the module's docstring tells of the attributes."""

    entry_score: EntryScore
    budgets: Budgets
    needs_gradient: bool
    help: str


# Entry scores


def _ratio(shards: Shards, group: Group, seed: int) -> list[Tensor]:
    return [gradient_to_weight_ratio_(_gradient_of(shard), shard.weight) for shard in shards]


def _damped_ratio(shards: Shards, group: Group, seed: int) -> list[Tensor]:
    scales = root_mean_squares(
        [shard.weight for shard in shards],
        [shard.numel for shard in shards],
        [shard.name for shard in shards],
        shards[0].device,
        group,
    )
    return [
        gradient_to_weight_ratio_(
            _gradient_of(shard),
            shard.weight,
            max(DAMPING * scale, EPSILON),  # of a matrix of zeros too the ratio is finite
        )
        for shard, scale in zip(shards, scales, strict=True)
    ]


def _gradient(shards: Shards, group: Group, seed: int) -> list[Tensor]:
    return [gradient_magnitude_(_gradient_of(shard)) for shard in shards]


def _weight(shards: Shards, group: Group, seed: int) -> list[Tensor]:
    return [weight_magnitude(shard.weight, shard.device) for shard in shards]


def _chance(shards: Shards, group: Group, seed: int) -> list[Tensor]:
    return [
        random_scores(s.start, s.start + s.weight.numel(), s.name, seed, s.device) for s in shards
    ]


def _gradient_of(shard: TargetShard) -> Tensor:
    assert shard.gradient is not None, "the rule needs a gradient"
    return shard.gradient


# Layer scores


def _norm_times_entropy(scores: Sequence[Tensor], shards: Shards, group: Group) -> list[float]:
    numels, names = [shard.numel for shard in shards], [shard.name for shard in shards]
    return layer_statistics(scores, numels, names, group).score


def _equal(scores: Sequence[Tensor], shards: Shards, group: Group) -> list[float]:
    refuse_not_finite(scores, [shard.name for shard in shards], group)
    return [1.0] * len(shards)


# Budgets


def in_proportion_to(layer_score: LayerScore) -> Budgets:
    """Budgets that share K in proportion to the layers' scores."""

    def budgets(
        scores: Sequence[Tensor], shards: Shards, budget: int, group: Group
    ) -> tuple[list[int], list[float]]:
        layer_scores = layer_score(scores, shards, group)
        return allocate_budget(layer_scores, [s.numel for s in shards], budget), layer_scores

    return budgets


def one_threshold(
    scores: Sequence[Tensor], shards: Shards, budget: int, group: Group
) -> tuple[list[int], list[float]]:
    """Of each layer as many as are among the K largest of all layers together."""
    refuse_not_finite(scores, [shard.name for shard in shards], group)
    counts = count_among_largest(scores, budget, group)
    return counts, [float(count) for count in counts]


RULES = {
    "gem": Rule(
        entry_score=_ratio,
        budgets=in_proportion_to(_norm_times_entropy),
        needs_gradient=True,
        help="gradient relative to the weight, |g| / |w|, budgets by its norm times its entropy "
        "(arXiv 2508.16191)",
    ),
    "ratio": Rule(
        entry_score=_ratio,
        budgets=in_proportion_to(_equal),
        needs_gradient=True,
        help="as gem with equal budgets",
    ),
    "gradient": Rule(
        entry_score=_gradient,
        budgets=in_proportion_to(_equal),
        needs_gradient=True,
        help="|g| with equal budgets",
    ),
    "entropy_gradient": Rule(
        entry_score=_gradient,
        budgets=in_proportion_to(_norm_times_entropy),
        needs_gradient=True,
        help="|g|, budgets by its norm times its entropy",
    ),
    "magnitude": Rule(
        entry_score=_weight,
        budgets=in_proportion_to(_equal),
        needs_gradient=False,
        help="|w| with equal budgets",
    ),
    "random": Rule(
        entry_score=_chance,
        budgets=in_proportion_to(_equal),
        needs_gradient=False,
        help="by chance with equal budgets",
    ),
    "supertuning": Rule(
        entry_score=_weight,
        budgets=one_threshold,
        needs_gradient=False,
        help="the largest |w| of all layers together (arXiv 2607.09287)",
    ),
    "damped": Rule(
        entry_score=_damped_ratio,
        budgets=in_proportion_to(_norm_times_entropy),
        needs_gradient=True,
        help=f"as gem with |g| / (|w| + {DAMPING:g} rms(w)), so that weights next to 0 do not "
        "decide the budgets",
    ),
    "ratio_global": Rule(
        entry_score=_ratio,
        budgets=one_threshold,
        needs_gradient=True,
        help="the largest |g| / |w| of all layers together (compare GaLLoP, arXiv 2510.19778)",
    ),
}

SPARSE_METHODS = tuple(RULES)
CALIBRATED_METHODS = tuple(name for name, rule in RULES.items() if rule.needs_gradient)
