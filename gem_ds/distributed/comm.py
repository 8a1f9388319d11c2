"""The ranks of a run and what they say to each other: the only door to torch.distributed.

One class serves one rank or a thousand. With nobody to talk to, every call returns at once, so the
code above holds no branch on the world size. All collectives run on the default process group, in
the same order on every rank; calibration's reductions alone have one of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gem_ds.errors import PeerError, sentence_of

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Comm:
    """This process's place among the ranks; satisfies :class:`gem_ds.select.shards.Group`.

    Tensors that cross the network must lie on ``device`` (NCCL wants the GPU, gloo the CPU).
    """

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank() if is_joined() else 0
        self.world_size = dist.get_world_size() if is_joined() else 1
        self.device = device
        self._reducing: dist.ProcessGroup | None = None  # the group of reduce-scatters

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes files."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """Reduce ``tensor`` over the ranks in place and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=_OPS[op])
        return tensor

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` [world_size * n] over the ranks; return this rank's n entries of it."""
        return self.start_reduce_scatter(tensor)()

    def start_reduce_scatter(self, tensor: Tensor) -> Callable[[], Tensor]:
        """The same, begun: what it returns waits; until then ``tensor`` belongs to the network."""
        if self.world_size == 1:
            return lambda: tensor
        length, rest = divmod(tensor.numel(), self.world_size)
        assert rest == 0, f"{tensor.numel()} entries do not divide over {self.world_size} ranks"
        shard = tensor.new_empty(length)
        work = dist.reduce_scatter_tensor(shard, tensor, group=self._reducing, async_op=True)

        def wait() -> Tensor:
            nonlocal tensor
            work.wait()
            tensor = shard  # until here the network read it
            return shard

        return wait

    @contextmanager
    def reducing_apart(self) -> Iterator[None]:
        """While the block lasts, reduce-scatters run in a process group of their own.

        A GPU runs a group's collectives one after another: those of a backward pass would stand in
        line with ZeRO-3's gathers of the weights that it needs next.
        """
        if self.world_size == 1:
            yield
            return
        group = self._reducing = dist.new_group(timeout=collective_timeout())
        try:
            yield
        finally:
            self._reducing = None
        dist.destroy_process_group(group)  # after an error others may still be in it

    def gather_shards(self, shard: Tensor) -> Tensor:
        """Put ranges of n entries, one on each rank, together: [world_size * n] on every rank.

        Unlike :meth:`gather` it asks nobody for lengths, so a GPU does not wait for it.
        """
        if self.world_size == 1:
            return shard
        whole = shard.new_empty(self.world_size * shard.numel())
        dist.all_gather_into_tensor(whole, shard)
        return whole

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Collect 1-D tensors, whose lengths may differ between ranks, in rank order on rank 0.

        The others get none.
        """
        if self.world_size == 1:
            return [tensor]
        lengths = torch.zeros(self.world_size, dtype=torch.int64, device=tensor.device)
        lengths[self.rank] = tensor.numel()
        sizes = self.all_reduce(lengths, "sum").tolist()
        padded = tensor.new_zeros(max(sizes))
        padded[: tensor.numel()] = tensor
        parts = [torch.empty_like(padded) for _ in sizes] if self.is_main else None
        dist.gather(padded, parts)
        return [part[:size] for part, size in zip(parts or [], sizes, strict=False)]

    def start_reading(self, tensor: Tensor) -> Callable[[], list[float]]:
        """Begin to copy a small tensor to the host; what it returns waits for that, and no more."""
        if tensor.device.type == "cpu":
            return tensor.tolist
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        copy.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def read() -> list[float]:
            event.synchronize()
            return copy.tolist()

        return read

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value`` (picklable) on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's ``value`` (picklable), in rank order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """True on every rank when ``flag`` is true on at least one."""
        return bool(self.largest(int(flag)))

    def largest(self, value: int) -> int:
        """The largest of the ranks' values."""
        return int(self.all_reduce(torch.tensor([value], device=self.device), "max").item())

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Leave the block together: when one rank fails in it, all ranks raise.

        Rank 0 raises what went wrong, whichever rank it went wrong on; the others raise
        :class:`PeerError`, unless their own error is not one that a user can mend. Without this
        the others would wait for ever in their next collective. The block itself must hold no
        collective that a failed rank would have skipped.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if not self.any(error is not None):
            return
        sentences = self.gather_objects(None if error is None else sentence_of(error))
        if error is not None and (self.is_main or not isinstance(error, (ValueError, OSError))):
            raise error
        rank, sentence = next((r, s) for r, s in enumerate(sentences) if s is not None)
        if self.is_main:
            raise ValueError(f"On rank {rank}: {sentence}")
        raise PeerError(f"Rank {rank} stopped: {sentence}") from error

    @contextmanager
    def in_unison(self) -> Iterator[None]:
        """A ``ValueError`` of the block comes on all ranks alike: rank 0 alone tells it.

        For errors that follow from what the ranks have already exchanged; it communicates nothing.
        """
        try:
            yield
        except ValueError as error:
            if self.is_main:
                raise
            raise PeerError(str(error)) from error


def is_joined() -> bool:
    """Whether this process is in a group already, whoever has joined it."""
    return dist.is_initialized()


def store_of_group() -> Any:
    """The store in which the ranks of the group have met, over a connection of this call's own.

    On the group's own connection a thread would wait for whatever the main thread waits for.
    """
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def collective_timeout() -> timedelta:
    """How long a rank waits for another, which may be writing a large model to a slow disk."""
    return timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", 120)))


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return int(store.port)
