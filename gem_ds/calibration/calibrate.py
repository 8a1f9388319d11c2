"""Calibration: batches -> gradient statistics in shards -> the selected entries.

In each backward, every target layer forms its dense gradient ``dy^T x`` of one micro-batch, sums it
over the ranks into the ranks' own ranges (:mod:`gem_ds.calibration.gradients`), and drops it. A
rank keeps fp32 statistics of its own ranges only; two dense matrices exist at a time, the product
of a layer and that of the layer before it, which is on its way. More are kept where a buffer is
allowed.

The engine, its hooks and its partitions are those of training; no optimizer step is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from gem_ds.calibration.gradients import (
    ShardReducer,
    begin_micro_batch,
    make_sinks,
    refuse_repeated,
)
from gem_ds.data.batches import Batches, SummedLoss
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.engine import Engine
from gem_ds.select.rules import RULES, Statistic
from gem_ds.select.selection import Selection, select_shards
from gem_ds.select.shards import TargetShard
from gem_ds.select.zeros import find_candidates
from gem_ds.sparse.layers import TargetLayer
from gem_ds.sparse.target_layers import TargetLayers

#: The backward runs on the mean loss of a micro-batch times this, so that half-precision gradients
#: stay in range; a power of two, so that taking it out again does not round.
LOSS_SCALE = 2.0**10

#: Steps after which a gradient that has been zero throughout is taken to be so for good. One is too
#: few: that of a query is zero in a sequence of one token.
NUM_TRIED_STEPS = 8

_NUM_NAMED = 8  # layers that a sentence names


def calibrate(
    engine: Engine,
    layers: TargetLayers,
    batches: Batches,
    summed_loss: SummedLoss,
    budget: int,
    progress: Callable[[], None] = lambda: None,
    *,
    rule: str = "gem",
    seed: int = 0,
    keep_zeros: bool | None = False,
    buffer_gb: float = 0.0,
) -> Selection:
    """Score every target entry over one epoch of ``batches`` and select ``budget`` (K) of them.

    Returns this rank's part of the selection: its own ranges of the layers. A rule that looks at no
    gradient reads no batch; one that sums magnitudes or squares needs micro-batches of one example.
    ``progress`` is called after each step.
    """
    gradients: Sequence[Tensor | None] = [None] * len(layers)
    with engine.comm.in_unison():  # what cannot be is refused before any batch is read
        find_candidates(_shards(engine, layers, gradients), budget, engine.comm, keep_zeros)
    if statistic := RULES[rule].statistic:
        gradients = sum_gradients(
            engine,
            layers,
            batches,
            summed_loss,
            progress,
            buffer_gb=buffer_gb,
            statistic=statistic,
        )
    return select(engine, layers, gradients, budget, rule=rule, seed=seed, keep_zeros=keep_zeros)


def select(
    engine: Engine,
    layers: TargetLayers,
    gradients: Sequence[Tensor | None],
    budget: int,
    *,
    rule: str = "gem",
    seed: int = 0,
    keep_zeros: bool | None = False,
) -> Selection:
    """Select by the weights and by this rank's ranges of the gradients, which are consumed."""
    shards = _shards(engine, layers, gradients)
    with engine.comm.in_unison():
        return select_shards(
            shards, budget, engine.comm, rule=rule, seed=seed, keep_zeros=keep_zeros
        )


def _shards(
    engine: Engine, layers: TargetLayers, gradients: Sequence[Tensor | None]
) -> list[TargetShard]:
    return [
        TargetShard(
            name=layer.name,
            shape=layer.shape,
            start=engine.weights.shard_range(layer.weight)[0],
            gradient=gradient,
            weight=engine.weights.read_shard(layer.weight),
            device=engine.device,
        )
        for layer, gradient in zip(layers, gradients, strict=True)
    ]


def sum_gradients(
    engine: Engine,
    layers: TargetLayers,
    batches: Batches,
    summed_loss: SummedLoss,
    progress: Callable[[], None] = lambda: None,
    *,
    buffer_gb: float = 0.0,
    statistic: Statistic = "sum",
) -> list[Tensor]:
    """The gradient of the loss summed over one epoch, at the weights as they are.

    Or the sum of magnitudes or squares of the micro-batches' gradients, each that of one example.
    Per layer this rank's range (:meth:`Weights.shard_range`) of it, flat, fp32. Each rank may keep
    ``buffer_gb`` 10^9 bytes of whole gradients, which then cross the network once. A loss that is
    not finite is a ValueError, and so is a target that no gradient reaches: after the first step
    where no backward comes by it, after some more where what comes is zero.
    """
    comm, reducer = engine.comm, ShardReducer(engine.comm)
    sinks = make_sinks(engine.weights, layers, reducer, buffer_gb, statistic)
    engine.model.eval()  # no dropout: the gradient at the base weights is not a random quantity
    with layers.sinks(sinks), checkpointing_in_eval_mode(engine.model), comm.reducing_apart():
        for step, counts in enumerate(_largest_num_items(batches, comm)):
            num_broken = torch.zeros((), device=engine.device)
            for batch, num_items in zip(batches.micro_batches(step), counts, strict=True):
                begin_micro_batch(sinks, num_items / LOSS_SCALE)
                loss = summed_loss(engine.module(deliver=False), batch) / num_items
                engine.backward(loss, loss_scale=LOSS_SCALE)
                reducer.finish()
                with comm.in_unison():
                    refuse_repeated(sinks)
                num_broken += ~loss.detach().isfinite()
            if comm.all_reduce(num_broken, "max").item():
                with comm.in_unison():
                    raise ValueError(
                        "The loss is not finite during calibration: check the base model and "
                        "the data, or use --bf16 or fp32 instead of --fp16."
                    )
            if step == 0:
                flags = [torch.tensor(sink.is_reached, device=engine.device) for sink in sinks]
                _refuse_unreached(layers, flags, comm, is_first=True)
            elif step == NUM_TRIED_STEPS - 1:
                _refuse_unreached(layers, [sink.sums for sink in sinks], comm, is_first=True)
            progress()
    shards = [sink.take() for sink in sinks]
    _refuse_unreached(layers, shards, comm)
    return shards


def _refuse_unreached(
    layers: TargetLayers, sums: list[Tensor], comm: Comm, *, is_first: bool = False
) -> None:
    """:func:`refuse_unreached` on all ranks alike, each of which holds a part of the sums."""
    reached = torch.stack([part.any() for part in sums]).float()
    comm.all_reduce(reached, "max")
    with comm.in_unison():
        refuse_unreached(layers, reached.bool().tolist(), is_first=is_first)


def _largest_num_items(batches: Batches, comm: Comm) -> list[list[int]]:
    """For each step and micro-batch the most items of a rank's part, 1 at least.

    The ranks talk about it once, so that no micro-batch has to wait for the device.
    """
    own = [batches.num_items_by_micro_batch(step) for step in range(batches.steps_per_epoch)]
    largest = comm.all_reduce(torch.tensor(own, device=comm.device), "max")
    counts: list[list[int]] = largest.clamp_(min=1).tolist()
    return counts


@contextmanager
def checkpointing_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Checkpoint the blocks that training checkpoints; transformers itself does in train mode only.

    Without it calibration would need more memory than the training that it prepares.
    """
    blocks: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    own = [vars(block).get("forward") for block in blocks]  # where the class's was replaced
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def refuse_unreached(
    layers: Sequence[TargetLayer], reached: Sequence[bool], *, is_first: bool = False
) -> None:
    """Raise a ValueError that names the layers which no gradient has reached.

    After the first steps experts may still wait for a token that is routed to them.
    """
    unreached = [
        layer.name
        for layer, flag in zip(layers, reached, strict=True)
        if not flag and not (is_first and "expert" in layer.name)
    ]
    if not unreached:
        return
    names = ", ".join(unreached[:_NUM_NAMED])
    if len(unreached) > _NUM_NAMED:
        names += f" and {len(unreached) - _NUM_NAMED} more of {len(layers)} targets"
    raise ValueError(
        f"No gradient reaches {names}: leave such layers out of --target_modules (one regular "
        "expression can tell them apart), or check that the model uses them for this task."
    )
