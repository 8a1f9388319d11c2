"""Calibration: batches -> gradient statistics in shards -> the selected entries.

In each backward, every target layer forms its dense gradient ``dy^T x`` of one micro-batch, sums it
over the ranks straight into the ranks' own ranges, and drops it. A rank keeps fp32 statistics of
its own ranges only; the one dense matrix that exists at a time is the layer's product.

The engine, its hooks and its partitions are those of training; no optimizer step is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from gem_ds.batches import Batches
from gem_ds.comm import Comm
from gem_ds.loss import SummedLoss
from gem_ds.methods import CALIBRATED_METHODS
from gem_ds.sddmm import product
from gem_ds.selection import Selection, select_shards
from gem_ds.sparse import TargetLayer, TargetLayers
from gem_ds.sparse_methods import TargetShard
from gem_ds.zero import Engine

#: The backward runs on the mean loss of a micro-batch times this, so that half-precision gradients
#: stay in range; a power of two, so that taking it out again does not round.
LOSS_SCALE = 2.0**10


@dataclass
class StatisticsSink:
    """Sums one layer's dense gradient into this rank's range of it.

    Attributes:
        shard: fp32 [stop - start], this rank's range of the summed gradient.
        scale: what the next micro-batch's gradient is multiplied by.
    """

    layer: TargetLayer
    comm: Comm
    partition_size: int
    shard: Tensor
    scale: float = 1.0

    def __call__(self, dy: Tensor, x: Tensor) -> None:
        """Add the gradient of one backward, over all ranks."""
        padded = torch.empty(
            self.partition_size * self.comm.world_size, dtype=torch.float32, device=x.device
        )
        padded[self.layer.numel :] = 0
        product(dy, x, out=padded[: self.layer.numel].view(self.layer.shape))
        summed = self.comm.reduce_scatter(padded)
        self.shard.add_(summed[: self.shard.numel()], alpha=self.scale)


def calibrate(
    engine: Engine,
    layers: TargetLayers,
    batches: Batches,
    summed_loss: SummedLoss,
    total: int,
    progress: Callable[[], None] = lambda: None,
    *,
    method: str = "gem",
    seed: int = 0,
) -> Selection:
    """Score every target entry over one epoch of ``batches`` and select ``total`` of them.

    A method that looks at no gradient reads no batch.

    Args:
        engine: holds the model; its weights are read, none is changed.
        layers: the target layers.
        batches: the calibration examples.
        summed_loss: the loss of one micro-batch, summed over what its weight counts.
        total: K.
        progress: called after each step.
        method: one of :data:`gem_ds.methods.SPARSE_METHODS`.
        seed: of methods that choose by chance.

    Returns:
        This rank's part of the selection (its own ranges of the layers).

    Raises:
        ValueError: the loss or a score is not finite, or no gradient reaches a target.
    """
    gradients: Sequence[Tensor | None] = [None] * len(layers)
    if method in CALIBRATED_METHODS:
        gradients = sum_gradients(engine, layers, batches, summed_loss, progress)
    shards = []
    for layer, gradient in zip(layers, gradients, strict=True):
        start, _ = engine.shard_range(layer.weight)
        shards.append(
            TargetShard(
                name=layer.name,
                numel=layer.numel,
                start=start,
                gradient=gradient,
                weight=engine.read_shard(layer.weight),
                device=engine.device,
            )
        )
    with engine.comm.in_unison():
        return select_shards(shards, total, engine.comm, method=method, seed=seed)


def sum_gradients(
    engine: Engine,
    layers: TargetLayers,
    batches: Batches,
    summed_loss: SummedLoss,
    progress: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """The gradient of the loss summed over one epoch, in shards.

    Returns:
        Per layer, this rank's range (:meth:`Engine.shard_range`) of the flat gradient, fp32.

    Raises:
        ValueError: as :func:`calibrate`.
    """
    sinks = [_statistics_sink(engine, layer) for layer in layers]
    engine.model.eval()  # no dropout: the gradient at the base weights is not a random quantity
    with layers.sinks(sinks), _checkpointing_in_eval_mode(engine.model):
        for step in range(batches.steps_per_epoch):
            weighted = zip(batches.micro_batches(step), batches.weights(step), strict=True)
            for batch, own_weight in weighted:
                weight = max(1, engine.comm.largest(own_weight))
                for sink in sinks:
                    sink.scale = weight / LOSS_SCALE

                def mean_loss(model: nn.Module, batch: dict = batch, n: int = weight) -> Tensor:
                    return summed_loss(model, batch) / n

                loss = engine.backward(mean_loss, deliver=False, loss_scale=LOSS_SCALE)
                if engine.comm.any(not torch.isfinite(loss).item()):
                    with engine.comm.in_unison():
                        raise ValueError(
                            "The loss is not finite during calibration: check the base model and "
                            "the data, or use --bf16 or fp32 instead of --fp16."
                        )
            progress()
    with engine.comm.in_unison():
        _refuse_without_gradient(sinks, engine.comm)
    return [sink.shard for sink in sinks]


@contextmanager
def _checkpointing_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Checkpoint the blocks that training checkpoints; transformers itself does in train mode only.

    Without it calibration would need more memory than the training that it prepares.
    """
    blocks: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    for block in blocks:
        block.forward = partial(block._gradient_checkpointing_func, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _statistics_sink(engine: Engine, layer: TargetLayer) -> StatisticsSink:
    start, stop = engine.shard_range(layer.weight)
    return StatisticsSink(
        layer=layer,
        comm=engine.comm,
        partition_size=engine.partition_size(layer.weight),
        shard=torch.zeros(stop - start, dtype=torch.float32, device=engine.device),
    )


def _refuse_without_gradient(sinks: list[StatisticsSink], comm: Comm) -> None:
    reached = torch.tensor(
        [float(sink.shard.count_nonzero()) for sink in sinks], device=comm.device
    )
    comm.all_reduce(reached, "max")
    if unreached := [s.layer.name for s, n in zip(sinks, reached.tolist(), strict=True) if n == 0]:
        raise ValueError(
            f"No gradient reaches {', '.join(unreached)}: leave such layers out of "
            "--target_modules, or check that the model uses them for this task."
        )
