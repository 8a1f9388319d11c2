"""What calibration keeps of each target layer: its summed gradient, fp32, in the ranks' own ranges.

In each backward a layer hands its sink (x, dy), and the dense gradient ``dy^T x`` of one
micro-batch is formed. Where it goes is the sink's kind:

* :class:`ShardSink` sums it over the ranks into the ranges, at once, and drops it. The
  reduction of one layer runs while the backward goes on to the next one.
* :class:`BufferedSink` adds it to a whole gradient on this rank, which crosses the network once, at
  the end. That takes memory (:func:`buffered_layers`), except on one rank, where the range is the
  whole matrix.

Either way the sum is the same but for the rounding of fp32, and no parameter has a ``.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.weights import Weights
from gem_ds.sparse.layers import TargetLayer

_BYTES = 4  # of an fp32 number


class ShardReducer:
    """Sums whole gradients over the ranks into shards, one after another, without waiting.

    At most one is on its way while the next is formed.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self._finish: Callable[[], object] | None = None

    def add(self, shard: Tensor, whole: Tensor, scale: float) -> None:
        """Begin to add ``scale`` times this rank's part of the ranks' sum of ``whole``.

        Args:
            shard: fp32 [m], what is added to.
            whole: fp32 [world_size * partition], given away; m is at most the partition.
            scale: the same on every rank.
        """
        self.finish()
        wait = self.comm.start_reduce_scatter(whole)
        self._finish = lambda: shard.add_(wait()[: shard.numel()], alpha=scale)

    def finish(self) -> None:
        """Wait for what is on its way and add it."""
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()


@dataclass
class ShardSink:
    """Sums one layer's dense gradient into this rank's range of it, micro-batch by micro-batch.

    Attributes:
        shard: fp32 [stop - start], this rank's range of the summed gradient; it is up to date when
            the reducer has finished.
        scale: what the next micro-batch's gradient is multiplied by.
    """

    layer: TargetLayer
    reducer: ShardReducer
    partition_size: int
    shard: Tensor
    scale: float = 1.0

    def __call__(self, *factors: Tensor) -> None:
        """Add the gradient of one backward, over all ranks."""
        length = self.partition_size * self.reducer.comm.world_size
        padded = torch.empty(length, dtype=torch.float32, device=self.shard.device)
        padded[self.layer.numel :] = 0
        self.layer.whole_gradient(padded[: self.layer.numel].view(self.layer.shape), *factors)
        self.reducer.add(self.shard, padded, self.scale)

    def take(self) -> Tensor:
        """This rank's range of the gradient, fp32."""
        return self.shard


@dataclass
class BufferedSink:
    """Sums one layer's dense gradient on this rank, to be reduced once.

    Attributes:
        whole: fp32 [world_size * partition], where it is summed; zeros to begin with.
        length: of this rank's range.
        scale: what the next micro-batch's gradient is multiplied by.
    """

    layer: TargetLayer
    comm: Comm
    whole: Tensor
    length: int
    scale: float = 1.0

    def __call__(self, *factors: Tensor) -> None:
        """Add the gradient of one backward on this rank."""
        sums = self.whole[: self.layer.numel].view(self.layer.shape)
        self.layer.add_whole_gradient(sums, *factors, scale=self.scale)

    def take(self) -> Tensor:
        """Reduce; this rank's range of the gradient, fp32. The buffer is given away."""
        whole = self.whole
        del self.whole
        return self.comm.reduce_scatter(whole)[: self.length]


def make_sinks(
    weights: Weights,
    layers: Sequence[TargetLayer],
    reducer: ShardReducer,
    buffer_gb: float,
) -> list[ShardSink | BufferedSink]:
    """A sink for each layer, buffered where :func:`buffered_layers` says so."""
    comm = weights.comm
    partitions = [weights.partition_size(layer.weight) for layer in layers]
    buffered = buffered_layers(partitions, comm.world_size, buffer_gb)
    sinks: list[ShardSink | BufferedSink] = []
    for i, (layer, partition) in enumerate(zip(layers, partitions, strict=True)):
        start, stop = weights.shard_range(layer.weight)
        if i in buffered:
            whole = torch.zeros(
                partition * comm.world_size, dtype=torch.float32, device=comm.device
            )
            sinks.append(BufferedSink(layer, comm, whole, stop - start))
        else:
            shard = torch.zeros(stop - start, dtype=torch.float32, device=comm.device)
            sinks.append(ShardSink(layer, reducer, partition, shard))
    return sinks


def buffered_layers(
    partition_sizes: Sequence[int], world_size: int, buffer_gb: float
) -> frozenset[int]:
    """Which layers keep a whole gradient: as many as fit, so the smallest first.

    What a whole gradient takes is counted beyond the range of it that this rank keeps anyway. On
    one rank that is nothing, and all layers are buffered.

    Args:
        partition_sizes: of each layer the entries of one rank's range, padding included.
        world_size: the ranks.
        buffer_gb: what they may take on each rank, in 10^9 bytes.

    Returns:
        Positions in ``partition_sizes``, the same on every rank.
    """
    sizes = [_BYTES * (world_size - 1) * size for size in partition_sizes]
    left = buffer_gb * 1e9
    chosen = []
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        if sizes[i] > left:
            break
        left -= sizes[i]
        chosen.append(i)
    return frozenset(chosen)
