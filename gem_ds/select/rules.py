"""How the sparse methods choose entries: what an entry's score is, and what a layer's score is.

Entries are shared among the layers in proportion to the layers' scores
(:func:`select.budget.allocate_budget`), and each layer trains its entries of the highest score. The
table in :mod:`gem_ds.select.methods` says which method has which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gem_ds.select.methods import SPARSE_METHODS
from gem_ds.select.scores import (
    Group,
    gradient_magnitude_,
    gradient_to_weight_ratio_,
    layer_statistics,
    random_scores,
    refuse_not_finite,
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
        gradient: fp32 [m], the calibration gradient, which selection overwrites; None for methods
            that do not look at it.
        device: where scores are computed and reduced.
    """

    name: str
    numel: int
    start: int
    weight: Tensor
    gradient: Tensor | None
    device: torch.device


EntryScore = Callable[[TargetShard, int], Tensor]
"""Takes a shard and a seed; fp32 [m], non-negative."""

LayerScore = Callable[[Sequence[Tensor], Sequence[TargetShard], int, Group], list[float]]
"""Takes this rank's entry scores of all layers, the shards, K and the ranks; a number per layer."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A way to choose entries.

    Attributes:
        entry_score: the more, the sooner an entry is trained.
        layer_score: in proportion to which the layers share K.
    """

    entry_score: EntryScore
    layer_score: LayerScore


def _ratio(shard: TargetShard, seed: int) -> Tensor:
    assert shard.gradient is not None
    return gradient_to_weight_ratio_(shard.gradient, shard.weight)


def _gradient(shard: TargetShard, seed: int) -> Tensor:
    assert shard.gradient is not None
    return gradient_magnitude_(shard.gradient)


def _weight(shard: TargetShard, seed: int) -> Tensor:
    return weight_magnitude(shard.weight, shard.device)


def _chance(shard: TargetShard, seed: int) -> Tensor:
    stop = shard.start + shard.weight.numel()
    return random_scores(shard.start, stop, shard.name, seed, shard.device)


def _norm_times_entropy(
    scores: Sequence[Tensor], shards: Sequence[TargetShard], total: int, group: Group
) -> list[float]:
    numels, names = [shard.numel for shard in shards], [shard.name for shard in shards]
    return layer_statistics(scores, numels, names, group).score


def _equal(
    scores: Sequence[Tensor], shards: Sequence[TargetShard], total: int, group: Group
) -> list[float]:
    refuse_not_finite(scores, [shard.name for shard in shards], group)
    return [1.0] * len(shards)


def _among_largest(
    scores: Sequence[Tensor], shards: Sequence[TargetShard], total: int, group: Group
) -> list[float]:
    refuse_not_finite(scores, [shard.name for shard in shards], group)
    return [float(count) for count in count_among_largest(scores, total, group)]


RULES = {
    "gem": Rule(entry_score=_ratio, layer_score=_norm_times_entropy),
    "ratio": Rule(entry_score=_ratio, layer_score=_equal),
    "gradient": Rule(entry_score=_gradient, layer_score=_equal),
    "entropy_gradient": Rule(entry_score=_gradient, layer_score=_norm_times_entropy),
    "magnitude": Rule(entry_score=_weight, layer_score=_equal),
    "random": Rule(entry_score=_chance, layer_score=_equal),
    "supertuning": Rule(entry_score=_weight, layer_score=_among_largest),
}
assert tuple(RULES) == SPARSE_METHODS
