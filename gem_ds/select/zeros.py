"""Entries that are exactly 0, as pruning leaves them: counted, and kept out of a selection.

A zero that is never selected is never trained, so a pattern of zeros, 2:4 among them, survives
the training to the bit. The ratio ``|g| / (|w| + 1e-8)`` is largest where w is 0 and would undo it
first. What is left out of a layer is left out of all that its scores decide: its statistics, its
budget, which may not exceed the other entries, and the top k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gem_ds.select.shards import Group, Shards, TargetShard, matrices

#: With a larger share of zeros a matrix was pruned; of those that training leaves there are fewer.
PRUNED_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What can be selected, per layer and the same on every rank."""

    keep_zeros: bool  # whether zeros cannot be
    num_zeros: list[int]  # entries that are 0, of either sign; over all ranks
    sizes: list[int]  # entries that can be selected


def find_candidates(
    shards: Shards, budget: int, group: Group, keep_zeros: bool | None
) -> Candidates:
    """Count the zeros; a ValueError where fewer than ``budget`` entries can be selected.

    ``keep_zeros`` None keeps them in all matrices if one has more than :data:`PRUNED_SHARE`.
    """
    shards = [matrix for shard in shards for matrix in matrices(shard)]
    numels = [shard.numel for shard in shards]
    if not 1 <= budget <= sum(numels):
        raise ValueError(
            f"{budget} entries cannot be selected from target matrices that hold {sum(numels)}: "
            "change the density or the target modules."
        )
    counts = [(shard.weight == 0).sum().to(shard.device) for shard in shards]
    num_zeros: list[int] = group.all_reduce(torch.stack(counts), "sum").tolist()
    if keep_zeros is None:
        pairs = zip(num_zeros, numels, strict=True)
        keep_zeros = any(zeros > PRUNED_SHARE * numel for zeros, numel in pairs)
    sizes = [numel - zeros * keep_zeros for numel, zeros in zip(numels, num_zeros, strict=True)]
    if budget > sum(sizes):
        raise ValueError(
            f"The target matrices hold {sum(sizes):,} entries that are not 0, and {budget:,} are "
            "to be selected: give a density, or a lower one, widen the target modules, or set "
            "keep_zeros to false, which selects zeros too."
        )
    return Candidates(keep_zeros=keep_zeros, num_zeros=num_zeros, sizes=sizes)


def without_zeros(scores: Sequence[Tensor], shards: Shards) -> list[Tensor]:
    """Of each layer the scores [c] of the entries that are not 0, in the place of all [m]."""
    found = []
    for score, shard in zip(scores, shards, strict=True):
        left = score[_is_not_zero(shard)]
        found.append(score[: left.numel()].copy_(left))
    return found


def flat_indices(positions: Tensor, shard: TargetShard) -> Tensor:
    """The flat indices of entries, int64 [k]; ``positions`` count a shard's that are not 0."""
    return _is_not_zero(shard).nonzero().squeeze(1)[positions].add_(shard.start)


def _is_not_zero(shard: TargetShard) -> Tensor:
    return (shard.weight != 0).to(shard.device)
