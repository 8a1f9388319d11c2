"""Which entries to train: gradients and weights in, sorted flat indices out.

    entry scores -> layer scores -> budgets -> top k

in four lines, for the shards of any number of ranks (:func:`select_shards`) and, through the same
lines, for dense tensors in one process (:func:`select_entries`). How gradients are computed, and
what becomes of the indices, is not decided here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gem_ds.select.rules import RULES, TargetShard
from gem_ds.select.scores import Group, Solo
from gem_ds.select.topk import top_k_indices


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The outcome, one item per layer. All but ``indices`` is the same on every rank.

    Attributes:
        names: the parameters' names.
        numels: entries of each whole matrix.
        layer_scores: why each layer got its budget.
        budgets: entries to train, over all ranks.
        indices: flat indices (int64, ascending, into the whole matrix) chosen in this rank's range.
    """

    names: list[str]
    numels: list[int]
    layer_scores: list[float]
    budgets: list[int]
    indices: list[Tensor]


def select_shards(
    shards: Sequence[TargetShard],
    budget: int,
    group: Group,
    *,
    rule: str = "gem",
    seed: int = 0,
) -> Selection:
    """Select ``budget`` entries of the matrices whose ranges the ranks hold.

    The layers' scores are the same bits on every rank and the budgets follow from them in exact
    arithmetic, so each rank computes its own copy and nothing needs to be broadcast.

    Args:
        shards: this rank's ranges, the layers in the same order on every rank. The ranges of a
            matrix ascend with the rank and cover it. Gradients are consumed.
        budget: K, the number of entries to select, from 1 to the sum of ``numel``.
        group: the ranks.
        rule: one of :data:`gem_ds.select.rules.RULES`.
        seed: of rules that choose by chance.

    Returns:
        The selection; equal scores go to the lowest flat index, on any number of ranks.

    Raises:
        ValueError: on every rank alike, if a score is not finite or ``budget`` is out of range.
    """
    names = [shard.name for shard in shards]
    numels = [shard.numel for shard in shards]
    _check_budget(budget, numels)
    chosen = RULES[rule]
    scores = chosen.entry_score(shards, group, seed)
    budgets, layer_scores = chosen.budgets(scores, shards, budget, group)
    indices = top_k_indices(scores, [shard.start for shard in shards], budgets, group)
    return Selection(
        names=names, numels=numels, layer_scores=layer_scores, budgets=budgets, indices=indices
    )


@torch.no_grad()
def select_entries(
    gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor], budget: int
) -> dict[str, Tensor]:
    """Select the ``budget`` entries that GEM would train, from dense tensors in one process.

    Args:
        gradients: by parameter name, the gradient of the summed calibration loss. Any shape and
            floating dtype, contiguous or not; not modified.
        weights: by the same names, the weights, of the same shapes. Their order is the order of
            the layers, in which ties between budgets are broken.
        budget: K, the number of entries to select, from 1 to the number of entries given.

    Returns:
        By name, in the order of ``weights``, the sorted flat (row-major) indices, int64 [k_l], on
        the gradient's device.

    Raises:
        ValueError: if names, shapes or dtypes do not fit, ``budget`` is out of range, or a
            gradient-to-weight ratio is not finite.
    """
    _check_tensors(gradients, weights)
    _check_budget(budget, [weight.numel() for weight in weights.values()])
    device = next(iter(gradients.values())).device  # a model may lie on several
    shards = [
        TargetShard(
            name=name,
            numel=weight.numel(),
            start=0,
            gradient=gradients[name].reshape(-1).to(device, torch.float32, copy=True),
            weight=weight.reshape(-1),
            device=device,
        )
        for name, weight in weights.items()
    ]
    selection = select_shards(shards, budget, Solo())
    return {
        name: index.to(gradients[name].device)
        for name, index in zip(selection.names, selection.indices, strict=True)
    }


def _check_budget(budget: int, numels: Sequence[int]) -> None:
    if not 1 <= budget <= sum(numels):
        raise ValueError(
            f"{budget} entries cannot be selected from target matrices that hold {sum(numels)}: "
            "change the density or the target modules."
        )


def _check_tensors(gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    unpaired = sorted(gradients.keys() ^ weights.keys())
    if unpaired:
        raise ValueError(
            f"Give each matrix a gradient and a weight; only one of them names {unpaired}."
        )
    for name, weight in weights.items():
        gradient = gradients[name]
        if gradient.shape != weight.shape:
            raise ValueError(
                f"Give {name} a gradient of its weight's shape: they have "
                f"{tuple(gradient.shape)} and {tuple(weight.shape)}."
            )
        if not (gradient.is_floating_point() and weight.is_floating_point()):
            raise ValueError(
                f"Give {name} a gradient and a weight of floating dtype: they have "
                f"{gradient.dtype} and {weight.dtype}."
            )
