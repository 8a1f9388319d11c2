"""What calibration keeps of each target layer: its summed gradient, fp32, in the ranks' own ranges.

In each backward a layer hands its sink the factors a and b of the dense gradient ``a^T b`` of one
micro-batch. Where that goes is the sink's kind:

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
from itertools import accumulate

import torch
from torch import Tensor

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.weights import Weights
from gem_ds.sparse.layers import TargetLayer
from gem_ds.sparse.sddmm import add_product, product


class ShardReducer:
    """Sums whole gradients over the ranks into shards, one after another, without waiting.

    At most one is on its way while the next is formed.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self._finish: Callable[[], object] | None = None

    def add(self, shard: Tensor, whole: Tensor, scale: float) -> None:
        """Begin to add ``scale`` times this rank's part of the ranks' sum of ``whole``.

        ``shard``: fp32 [m]; ``whole``: fp32 [world_size * partition], given away. The scale is the
        same on every rank, and m at most the partition.
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
    """Sums one layer's dense gradient into this rank's range of it, micro-batch by micro-batch."""

    layer: TargetLayer
    reducer: ShardReducer
    partition_size: int
    shard: Tensor  # fp32 [stop - start], up to date when the reducer has finished
    scale: float = 1.0  # what the next micro-batch's gradient is multiplied by

    def __call__(self, a: Tensor, b: Tensor) -> None:
        """Add the gradient of one backward."""
        numel, shape = self.layer.numel, self.layer.shape
        length = self.partition_size * self.reducer.comm.world_size
        padded = torch.empty(length, dtype=torch.float32, device=self.shard.device)
        padded[numel:] = 0
        product(a, b, out=padded[:numel].view(shape))
        self.reducer.add(self.shard, padded, self.scale)

    @property
    def sums(self) -> Tensor:
        """What this rank holds so far."""
        return self.shard

    def take(self) -> Tensor:
        """This rank's range of the gradient, fp32."""
        return self.shard


@dataclass
class BufferedSink:
    """Sums one layer's dense gradient on this rank, to be reduced once."""

    layer: TargetLayer
    comm: Comm
    whole: Tensor  # fp32 [world_size * partition], where it is summed; zeros to begin with
    length: int  # of this rank's range
    scale: float = 1.0  # what the next micro-batch's gradient is multiplied by

    def __call__(self, a: Tensor, b: Tensor) -> None:
        """Add the gradient of one backward."""
        sums = self.whole[: self.layer.numel].view(self.layer.shape)
        add_product(sums, a, b, scale=self.scale)

    @property
    def sums(self) -> Tensor:
        """What this rank holds so far."""
        return self.whole

    def take(self) -> Tensor:
        """Reduce; this rank's range of the gradient, fp32. The buffer is given away."""
        whole = self.whole
        del self.whole
        return self.comm.reduce_scatter(whole)[: self.length]


def make_sinks(
    weights: Weights, layers: Sequence[TargetLayer], reducer: ShardReducer, buffer_gb: float
) -> list[ShardSink | BufferedSink]:
    """A sink for each layer, buffered where :func:`buffered_layers` says so."""
    comm = weights.comm
    partitions = [weights.partition_size(layer.weight) for layer in layers]
    buffered = buffered_layers(partitions, comm.world_size, buffer_gb)
    sinks: list[ShardSink | BufferedSink] = []
    for i, (layer, partition) in enumerate(zip(layers, partitions, strict=True)):
        start, stop = weights.shard_range(layer.weight)
        size = partition * comm.world_size if i in buffered else stop - start
        zeros = torch.zeros(size, dtype=torch.float32, device=comm.device)
        if i in buffered:
            sinks.append(BufferedSink(layer, comm, zeros, stop - start))
        else:
            sinks.append(ShardSink(layer, reducer, partition, zeros))
    return sinks


def buffered_layers(
    partition_sizes: Sequence[int], world_size: int, buffer_gb: float
) -> frozenset[int]:
    """Which layers keep a whole gradient: as many as fit, so the smallest first.

    Returns positions in ``partition_sizes``, the entries of one rank's range of each layer, padding
    included; they may take ``buffer_gb`` 10^9 bytes on each rank. What a whole gradient takes is
    counted beyond the range of it that this rank keeps anyway. On one rank that is nothing, and all
    layers are buffered.
    """
    sizes = [4 * (world_size - 1) * size for size in partition_sizes]  # bytes in fp32
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    taken = accumulate(sizes[i] for i in order)
    return frozenset(i for i, size in zip(order, taken, strict=True) if size <= buffer_gb * 1e9)
