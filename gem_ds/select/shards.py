"""What a rank holds of the target matrices, and how the ranks that share them talk.

Each matrix is cut into flat ranges that ascend with the rank. Selection sees ranges and a
:class:`Group`; one process with whole matrices is the group of one, :class:`Solo`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

#: Entries worked on at a time. On a CPU the fp64 temporaries (1 MB each) stay in a core's cache; a
#: GPU is to have more to do than a launch takes (three of 128 MB).
CHUNK, GPU_CHUNK = 2**17, 2**24


@dataclass(frozen=True, kw_only=True)
class TargetShard:
    """This rank's range of one target matrix; m may be 0."""

    name: str  # of the parameter
    shape: tuple[int, ...]  # of the whole matrix, or [matrices, rows, columns]
    start: int = 0  # flat index of the range's first entry
    weight: Tensor  # [m], any floating dtype, on any device
    gradient: Tensor | None = None  # fp32 [m], overwritten; None for rules that do not look at it
    device: torch.device  # where scores are computed and reduced

    @property
    def numel(self) -> int:
        """Entries of the whole matrix, n_l."""
        return math.prod(self.shape)


Shards = Sequence[TargetShard]


def matrices(shard: TargetShard) -> list[TargetShard]:
    """The shard of each matrix of a parameter that holds several, as of experts; often itself.

    A matrix of which this rank holds nothing has an empty shard.
    """
    if len(shard.shape) <= 2:
        return [shard]
    size, length = math.prod(shard.shape[-2:]), shard.weight.numel()
    parts = []
    for number in range(shard.numel // size):
        first = number * size - shard.start  # where the matrix begins, seen from the range's start
        start, stop = (min(max(place, 0), length) for place in (first, first + size))
        parts.append(
            replace(
                shard,
                name=f"{shard.name}[{number}]",
                shape=shard.shape[-2:],
                start=max(0, start - first) if start < stop else 0,
                weight=shard.weight[start:stop],
                gradient=None if shard.gradient is None else shard.gradient[start:stop],
            )
        )
    return parts


class Group(Protocol):
    """The ranks that share the matrices."""

    rank: int
    world_size: int

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """Reduce ``tensor`` over the ranks in place and return it."""
        ...


class Solo:
    """The group of one process: every reduction is the identity."""

    rank = 0
    world_size = 1

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """Return ``tensor`` as it is."""
        return tensor


def index_dtype(numel: int) -> torch.dtype:
    """The dtype of flat indices into a weight of `numel` entries: int32, from 2^31 on int64."""
    return torch.int32 if numel < 2**31 else torch.int64


def chunk_length(device: torch.device) -> int:
    """How many entries are worked on at a time on a device."""
    return CHUNK if device.type == "cpu" else GPU_CHUNK


def chunks(part: Tensor, device: torch.device | None = None) -> Sequence[Tensor]:
    """Views that cover ``part`` [m], of what is worked on at a time on a device (its own)."""
    return torch.split(part, chunk_length(device or part.device))
