"""What calibration keeps of each target layer: a sum of gradients, fp32, in the ranks' own ranges.

In each backward a layer hands its sink the factors a and b of the dense gradient ``a^T b`` of one
micro-batch. Where that goes is one of two ways:

* it is summed over the ranks into the ranges, at once, and dropped. The reduction of one layer runs
  while the backward goes on to the next one;
* it is added to a whole gradient on this rank, which crosses the network once, at the end. That
  takes memory (:func:`buffered_layers`), except on one rank, where the range is the whole matrix.

Either way the sum is the same but for the rounding of fp32, and no parameter has a ``.grad``. What
is summed is the gradient itself, its magnitude or its square (:class:`~gem_ds.select.rules.Rule`):
for the latter two a backward must be that of one example, and run each layer once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.weights import Weights
from gem_ds.sddmm import add_product, product
from gem_ds.select.rules import Statistic
from gem_ds.sparse.layers import TargetLayer


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


def terms_of(gradient: Tensor, scale: float, statistic: Statistic) -> tuple[Tensor, float]:
    """What is summed of ``scale * gradient``, fp32, overwritten, and what it is weighed by."""
    if statistic == "sum":
        return gradient, scale
    gradient.mul_(scale)
    return gradient.abs_() if statistic == "magnitudes" else gradient.square_(), 1.0


@dataclass
class GradientSink:
    """Sums one layer's dense gradient, micro-batch by micro-batch."""

    layer: TargetLayer
    reducer: ShardReducer
    partition_size: int  # of every rank's range, padding included
    #: Zeros to begin with, fp32: this rank's own sum [world_size * partition_size] where that is
    #: buffered, else its range of the sum over the ranks, up to date when the reducer has finished.
    sums: Tensor
    is_buffered: bool
    statistic: Statistic = "sum"
    scale: float = 1.0  # what the next micro-batch's gradient is multiplied by
    num_calls: int = 0  # in the present micro-batch
    is_reached: bool = False  # by any backward so far, be the gradient zero or not

    def __call__(self, a: Tensor, b: Tensor, ends: Tensor | None = None) -> None:
        """Add the gradient of one backward."""
        self.num_calls += 1
        self.is_reached = True
        numel, shape = self.layer.numel, self.layer.shape
        if not self.is_buffered:
            padded = self.sums.new_empty(self.partition_size * self.reducer.comm.world_size)
            padded[numel:] = 0
            product(a, b, padded[:numel].view(shape), ends=ends)
            self.reducer.add(self.sums, *terms_of(padded, self.scale, self.statistic))
            return
        whole = self.sums[:numel].view(shape)
        if self.statistic == "sum":
            add_product(whole, a, b, scale=self.scale, ends=ends)
        else:
            whole += terms_of(product(a, b, ends=ends), self.scale, self.statistic)[0]

    def take(self) -> Tensor:
        """This rank's range of the gradient, fp32; a buffer is reduced, and given away."""
        sums, comm = self.sums, self.reducer.comm
        if not self.is_buffered:
            return sums
        del self.sums
        start = min(comm.rank * self.partition_size, self.layer.numel)
        return comm.reduce_scatter(sums)[: self.layer.numel - start]


def begin_micro_batch(sinks: Sequence[GradientSink], scale: float) -> None:
    """Say what the next gradients are multiplied by."""
    for sink in sinks:
        sink.scale, sink.num_calls = scale, 0


def refuse_repeated(sinks: Sequence[GradientSink]) -> None:
    """Raise a ValueError where a layer's gradient came in parts, which would be summed as such."""
    repeated = [s.layer.name for s in sinks if s.num_calls > 1 and s.statistic != "sum"]
    if repeated:
        raise ValueError(
            f"The model runs {', '.join(repeated)} more than once for an example, so that no "
            "magnitude of its whole gradient is known: choose a rule that sums gradients as they "
            "are, such as gem, or leave such layers out of --target_modules."
        )


def make_sinks(
    weights: Weights,
    layers: Sequence[TargetLayer],
    reducer: ShardReducer,
    buffer_gb: float,
    statistic: Statistic = "sum",
) -> list[GradientSink]:
    """A sink for each layer, buffered where :func:`buffered_layers` says so."""
    comm = weights.comm
    partitions = [weights.partition_size(layer.weight) for layer in layers]
    buffered = buffered_layers(partitions, comm.world_size, buffer_gb)
    sinks = []
    for i, (layer, partition) in enumerate(zip(layers, partitions, strict=True)):
        start, stop = weights.shard_range(layer.weight)
        size = partition * comm.world_size if i in buffered else stop - start
        zeros = torch.zeros(size, dtype=torch.float32, device=comm.device)
        sinks.append(GradientSink(layer, reducer, partition, zeros, i in buffered, statistic))
    return sinks


def auto_buffer_gb(free: float, partition_sizes: Sequence[int]) -> float:
    """A buffer for whole gradients where so many bytes are free, in 10^9 bytes.

    Half of what the statistics leave: the other half is for activations and gathered weights.
    """
    return max(0.0, free - 4 * sum(partition_sizes)) / 2 / 1e9


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
