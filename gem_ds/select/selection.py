"""Which entries to train: gradients and weights in, sorted flat indices out.

    entry scores -> layer scores -> budgets -> top k

in four lines, for the shards of any number of ranks (:func:`select_shards`) and, through the same
lines, for dense tensors in one process (:func:`select_entries`). How gradients are computed, and
what becomes of the indices, is not decided here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from gem_ds.select.rules import RULES, Rule
from gem_ds.select.shards import Group, Shards, Solo, TargetShard, index_dtype, matrices
from gem_ds.select.sums import largest_magnitudes
from gem_ds.select.topk import count_among_largest, top_k_indices
from gem_ds.select.zeros import find_candidates, flat_indices, without_zeros

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The outcome, one item per layer. All but ``indices`` is the same on every rank."""

    layer_scores: list[float]  # why each layer got its budget
    budgets: list[int]  # entries to train, over all ranks
    num_zeros: list[int]  # entries that are 0, over all ranks
    settings: dict[str, Any]  # what a mask says of it: keep_zeros where zeros were left out
    #: Chosen in this rank's range, ascending; of the flat whole matrix, in ``index_dtype`` of it.
    indices: list[Tensor]


@torch.no_grad()
def select_shards(
    shards: Shards,
    budget: int,
    group: Group,
    *,
    rule: str = "gem",
    seed: int = 0,
    keep_zeros: bool | None = False,
) -> Selection:
    """Select ``budget`` (K) entries of the matrices whose ranges the ranks hold.

    Layers come in the same order on every rank; their gradients are consumed. Layer scores are the
    same bits everywhere and budgets follow from them in exact arithmetic, so each rank computes its
    own copy and nothing needs to be broadcast. Equal entry scores go to the lowest flat index, on
    any number of ranks. With ``keep_zeros`` entries that are exactly 0 are left out (None: if a
    matrix was pruned, :mod:`gem_ds.select.zeros`). A score that is not finite is a ValueError on
    every rank alike. A parameter that holds a matrix for each expert is as many layers; it gets
    what they get together.
    """
    parts = [matrices(shard) for shard in shards]
    layers = list(chain.from_iterable(parts))
    candidates = find_candidates(layers, budget, group, keep_zeros)
    chosen = RULES[rule]
    scores = chosen.entry_score(layers, group, seed)
    starts = [layer.start for layer in layers]
    if candidates.keep_zeros:
        scores, starts = without_zeros(scores, layers), [0] * len(layers)
    budgets, layer_scores = _budgets(chosen, scores, layers, candidates.sizes, budget, group)
    indices = top_k_indices(scores, starts, budgets, group)
    if candidates.keep_zeros:
        indices = [flat_indices(k, layer) for k, layer in zip(indices, layers, strict=True)]
    settings: dict[str, Any] = {"keep_zeros": True} if candidates.keep_zeros else {}
    if chosen.scales_rates:
        factors = (score / (max(layer_scores) or 1.0) for score in layer_scores)
        settings["rate_factors"] = {
            shard.name: list(islice(factors, len(part)))
            for shard, part in zip(shards, parts, strict=True)
        }
    found = iter(indices)
    return Selection(
        layer_scores=_joined(layer_scores, parts),
        budgets=_joined(budgets, parts),
        num_zeros=_joined(candidates.num_zeros, parts),
        settings=settings,
        indices=[
            _joined_indices([next(found) for _ in part], shard)
            for shard, part in zip(shards, parts, strict=True)
        ],
    )


def _budgets(
    rule: Rule,
    scores: Sequence[Tensor],
    layers: Shards,
    sizes: Sequence[int],
    budget: int,
    group: Group,
) -> tuple[list[int], list[float]]:
    """Per layer how many entries it trains, K in all, and the number that this follows from.

    ``scores`` are those of this rank's entries that can be selected; ``sizes`` counts all of these.
    """
    if rule.layer_score is None:  # one threshold for all layers
        largest_magnitudes(scores, layers, group)  # refuses what is not finite
        counts = count_among_largest(scores, budget, group)
        return counts, [float(count) for count in counts]
    layer_scores = rule.layer_score(scores, layers, group)
    return rule.share(layer_scores, sizes, budget), layer_scores


def _joined(numbers: Sequence[Number], parts: Sequence[Sequence[TargetShard]]) -> list[Number]:
    """Per parameter the sum of its matrices' numbers."""
    found = iter(numbers)
    return [sum(islice(found, len(part)), type(numbers[0])()) for part in parts]


def _joined_indices(indices: Sequence[Tensor], shard: TargetShard) -> Tensor:
    """Those into a parameter's matrices as flat indices into the parameter."""
    dtype, size = index_dtype(shard.numel), shard.numel // len(indices)
    own = [index.to(dtype) + i * size if i else index.to(dtype) for i, index in enumerate(indices)]
    return own[0] if len(own) == 1 else torch.cat(own)


def gather_indices(own: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Put the ranks' parts of a selection together: per layer all flat indices, on every rank.

    ``own`` are this rank's, ascending as the result, in the same dtypes on each rank; the ranks'
    ranges ascend. What several ranks have together has one dtype, the widest of these.
    """
    if group.world_size == 1:
        return list(own)
    counts = torch.zeros(len(own), group.world_size, dtype=torch.int64, device=own[0].device)
    counts[:, group.rank] = torch.tensor([index.numel() for index in own])
    sizes = group.all_reduce(counts, "sum").flatten().tolist()
    # Each rank's numbers among zeros: their sum is as long as the selection, whoever holds most.
    dtype = max((index.dtype for index in own), key=lambda dtype: dtype.itemsize)
    whole = own[0].new_zeros(sum(sizes), dtype=dtype)
    for index, piece in zip(own, whole.split(sizes)[group.rank :: group.world_size], strict=True):
        piece.copy_(index)
    return list(group.all_reduce(whole, "sum").split(counts.sum(dim=1).tolist()))


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
    devices = [gradient.device for gradient in gradients.values()]  # a model may lie on several
    shards = [
        TargetShard(
            name=name,
            shape=tuple(weight.shape),
            gradient=gradients[name].reshape(-1).to(devices[0], torch.float32, copy=True),
            weight=weight.reshape(-1),
            device=devices[0],
        )
        for name, weight in weights.items()
    ]
    selection = select_shards(shards, budget, Solo())
    return {
        name: index.to(gradients[name].device, torch.int64)
        for name, index in zip(weights, selection.indices, strict=True)
    }


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
