"""The training loop: one optimizer step after another, and the held-out loss between them.

One step, for a global batch of ``n`` items (answer tokens, or examples) over all ranks and
micro-batches:

    for each micro-batch of this rank:  backward of  summed loss * world_size / n
    engine.step()                       averages over the ranks, clips, updates the masters
    entries.write_back()                the weights show the new values

With ``--sam_rho`` a pass over the same micro-batches that delivers nothing goes before it, and this
one runs at perturbed weights (:mod:`gem_ds.sparse.sam`); with ``--sam_layers`` both are of layers
that are drawn for the step (:mod:`gem_ds.sparse.layer_draws`).

DeepSpeed's own division by the world size is made up for by the factor, so the gradient is that of
the mean loss over the global batch however it is cut. What is logged, evaluated and saved between
steps is the caller's business.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from gem_ds.data.batches import Batches, SummedLoss
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.dense_engine import DenseEngine
from gem_ds.distributed.engine import Engine
from gem_ds.files.checkpoint import TrainerState
from gem_ds.sparse.entries import HeadEntries, SelectedEntries
from gem_ds.sparse.sam import Sam, perturbed
from gem_ds.train.signals import stop_signals

StepEngine = Engine | DenseEngine


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step has found, the same on every rank."""

    loss: float  # mean over the items of the global batch, before the update
    learning_rate: float
    #: L2, before clipping, where the ZeRO stage computes it; reading it may wait for the GPU.
    grad_norm: Tensor | float | None
    num_tokens: int  # read over all ranks, padding left out
    seconds: float
    is_stopping: bool  # a rank has received a signal; this step was the last


class DivergedError(ValueError):
    """The loss or the gradient is no longer finite."""


def seed_noise(seed: int, step: int, rank: int) -> None:
    """Key dropout's noise by (seed, step, rank), so that a resumed run draws the same."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fit(
    engine: StepEngine,
    parts: Sequence[SelectedEntries | HeadEntries],
    train: Batches,
    summed_loss: SummedLoss,
    scheduler: LRScheduler,
    state: TrainerState,
    *,
    seed: int,
    sam: Sam | None = None,
) -> Iterator[StepResult]:
    """Train from ``state.global_step`` to ``state.max_steps``, one step for each item asked for.

    All ranks iterate together. Between two steps masters and weights agree, as they must before:
    the caller may evaluate or save. ``parts`` are entries of frozen weights, none where parameters
    of the model itself are trained, which DeepSpeed writes. ``seed`` is dropout's; ``sam`` is for
    entries, and draws layers of the first part. A SIGTERM or Ctrl-C ends it early; a loss or
    gradient that is not finite is a :class:`DivergedError`, and masters are as before that step.
    """
    with stop_signals() as received:
        while state.global_step < state.max_steps:
            step = state.global_step
            result = _step(engine, parts, train, summed_loss, scheduler, step, seed, sam, received)
            state.global_step += 1
            state.epoch = state.global_step / train.steps_per_epoch
            yield result
            if result.is_stopping:
                return


def _step(
    engine: StepEngine,
    parts: Sequence[SelectedEntries | HeadEntries],
    train: Batches,
    summed_loss: SummedLoss,
    scheduler: LRScheduler,
    step: int,
    seed: int,
    sam: Sam | None,
    received: list[int],
) -> StepResult:
    """One global batch: gradient, update, write-back."""
    comm = engine.comm
    started = time.perf_counter()
    engine.model.train()
    draws = None if sam is None else sam.draws
    drawn = None if draws is None else draws.draw(step)
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.training(drawn if part is parts[0] else None))
        seed_noise(seed, step, comm.rank)
        own = accumulate(engine, train, summed_loss, step, delivers=sam is None)
        if sam is not None:
            seed_noise(seed, step, comm.rank)  # the same dropout: of the same loss
            with perturbed(parts, sam.rho) as norms:
                accumulate(engine, train, summed_loss, step)
    if draws is not None and drawn is not None:
        read_norms = comm.start_reading(norms)
        parts[0].update_layers([count + 1 for count in draws.num_updates], drawn)
    own = own.double() / comm.world_size
    local = torch.stack([own, own.new_full((), float(len(received)))])
    read = comm.start_reading(comm.all_reduce(local, "sum"))
    train.collate_ahead(step + 1)
    learning_rate = float(scheduler.get_last_lr()[0])
    may_skip = engine.lowers_loss_scale
    is_applied = engine.step()  # waits for the device, once: it looks at the gradient first
    loss, num_stopping = read()
    if not math.isfinite(loss):
        _raise_diverged("loss", step, comm)
    if is_applied:
        for part in parts:
            part.write_back()
        if draws is not None and drawn is not None:
            draws.update(drawn, read_norms())
        scheduler.step()
    elif not may_skip:
        _raise_diverged("gradient", step, comm)
    return StepResult(
        loss=loss,
        learning_rate=learning_rate,
        grad_norm=engine.grad_norm,
        num_tokens=train.num_tokens(step),
        seconds=time.perf_counter() - started,
        is_stopping=num_stopping > 0,
    )


def accumulate(
    engine: StepEngine,
    train: Batches,
    summed_loss: SummedLoss,
    step: int,
    *,
    delivers: bool = True,
) -> Tensor:
    """Run the backward of a global batch; this rank's part of its mean loss, times the ranks.

    Its last micro-batch delivers the gradient to the optimizer, unless told otherwise.
    A loss that is not finite makes the whole gradient so, and the engine takes no step with that.
    """
    share = 1.0 / train.num_items(step)
    total = torch.zeros((), device=engine.device)
    for i, batch in enumerate(train.micro_batches(step)):
        model = engine.module(deliver=delivers and i == train.num_micro_batches - 1)
        loss = summed_loss(model, batch) * (share * engine.comm.world_size)
        total += loss.detach()
        engine.backward(loss * (1 + 0 * total))
    return total


def mean_loss(
    engine: StepEngine,
    batches: Batches,
    summed_loss: SummedLoss,
    progress: Callable[[], object] = lambda: None,
) -> float:
    """Mean loss over one epoch of ``batches``, without gradients; the same on all ranks."""
    engine.model.eval()
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    with torch.no_grad():
        for step in range(batches.steps_per_epoch):
            for batch in batches.micro_batches(step):
                total += summed_loss(engine.model, batch)
            progress()
    engine.comm.all_reduce(total, "sum")
    return total.item() / batches.dataset.num_items(range(len(batches.dataset)))


def _raise_diverged(what: str, step: int, comm: Comm) -> NoReturn:
    with comm.in_unison():
        raise DivergedError(
            f"The {what} is not finite at step {step + 1}: lower --learning_rate, or use --bf16 "
            f"instead of --fp16; checkpoints before checkpoint-{step} are good."
        )
