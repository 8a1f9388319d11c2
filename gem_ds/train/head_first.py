"""Training a new head alone for a while, so that a calibration sees the gradients of a trained one.

Those of a random head say mostly how often each label occurs. As linear probing before fine-tuning
(Kumar et al., arXiv 2202.10054), but for the mask only: afterwards the head is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from gem_ds.data.batches import Batches, SummedLoss
from gem_ds.distributed.engine import Engine
from gem_ds.sparse.entries import HeadEntries
from gem_ds.sparse.layers import TargetLayers
from gem_ds.train.fit import DivergedError, accumulate, seed_noise


@contextmanager
def trained_head(
    engine: Engine,
    layers: TargetLayers,
    head: HeadEntries,
    batches: Batches,
    summed_loss: SummedLoss,
    num_steps: int,
    learning_rate: float,
    *,
    seed: int,
) -> Iterator[None]:
    """While the block lasts, the head's values are those after ``num_steps`` of training it alone.

    All ranks enter and leave together. The optimizer is the engine's, its rates fall linearly from
    ``learning_rate`` to 0; they and fp16's loss scale are as before at the end. Masters and moments
    are set anew by whoever trains next (:meth:`sparse.entries.TrainedEntries.start_from_weights`).
    """
    first = head.start_from_weights()
    groups = engine.optimizer.param_groups
    rates, loss_scale = [group["lr"] for group in groups], engine.loss_scale
    engine.model.train()

    def deliver_zeros(*factors: Tensor) -> None:  # a delivering backward delivers all vectors
        layers.vector.gradient(0, 0, factors[0].device)

    with head.training(), layers.sinks([deliver_zeros] * len(layers)):
        for step in range(num_steps):
            for group in groups:
                group["lr"] = learning_rate * (1 - step / num_steps)
            seed_noise(seed, step, engine.comm.rank)
            accumulate(engine, batches, summed_loss, step)
            may_skip = engine.lowers_loss_scale
            if not engine.step() and not may_skip:
                with engine.comm.in_unison():
                    raise DivergedError(
                        "The gradient is not finite while the head is trained before the "
                        "calibration: lower --head_learning_rate, or pass "
                        "--calibration_head_steps 0."
                    )
            head.write_back()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    engine.loss_scale = loss_scale
    yield
    head.start_from(first)
    head.write_back()
