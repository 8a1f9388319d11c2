"""Ranks as threads of one process: what gem_ds expects of a group, without a network."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import torch
from torch import Tensor

from gem_ds.select.shards import Group, TargetShard

T = TypeVar("T")


class ThreadGroup:
    """One rank; the ranks meet at a barrier and read what the others have put down."""

    def __init__(self, rank: int, barrier: threading.Barrier, table: list[Tensor | None]) -> None:
        self.rank = rank
        self.world_size = barrier.parties
        self._barrier = barrier
        self._table = table

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """Reduce over the threads in place, as gem_ds.select.shards.Group asks."""
        self._table[self.rank] = tensor.clone()
        self._barrier.wait(timeout=60)
        stacked = torch.stack([entry for entry in self._table if entry is not None])
        self._barrier.wait(timeout=60)
        return tensor.copy_(stacked.sum(dim=0) if op == "sum" else stacked.amax(dim=0))


def run_threads(world_size: int, work: Callable[[ThreadGroup], T]) -> list[T]:
    """Call ``work(group)`` on every rank at once; the results in rank order.

    A rank that fails frees the others from the barrier, and its error is raised here.
    """
    barrier = threading.Barrier(world_size)
    table: list[Tensor | None] = [None] * world_size
    errors: list[BaseException] = []

    def guarded(rank: int) -> T:
        try:
            return work(ThreadGroup(rank, barrier, table))
        except BaseException as error:
            errors.append(error)  # the first is the cause, later ones are broken barriers
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(world_size)]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


def cut(tensor: Tensor, rank: int, world_size: int) -> tuple[int, Tensor]:
    """The range that ZeRO gives ``rank`` of a flat tensor: where it starts, and its entries.

    Ranges have ``ceil(n / world_size)`` entries; the last ones may be short or empty.
    """
    flat = tensor.reshape(-1)
    per_rank = -(-flat.numel() // world_size)
    start = min(rank * per_rank, flat.numel())
    return start, flat[start : start + per_rank]


def shards_of(
    group: Group, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None
) -> list[TargetShard]:
    """A rank's ranges of dense matrices; the gradients are copied, the weights are not."""
    shards = []
    for name, weight in weights.items():
        start, part = cut(weight, group.rank, group.world_size)
        gradient = None
        if gradients is not None:
            gradient = cut(gradients[name], group.rank, group.world_size)[1].clone()
        shards.append(
            TargetShard(
                name=name,
                shape=tuple(weight.shape),
                start=start,
                weight=part,
                gradient=gradient,
                device=part.device,
            )
        )
    return shards
