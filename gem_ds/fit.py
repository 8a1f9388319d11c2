"""The training loop: step, log, evaluate, checkpoint.

One step, for a global batch of ``n`` answer tokens over all ranks and micro-batches:

    for each micro-batch of this rank:  backward of  sum of token losses * world_size / n
    engine.step()                       averages over the ranks, clips, updates the masters
    entries.write_back()                the weights show the new values

DeepSpeed's own division by the world size is made up for by the factor, so the gradient is that of
the mean loss over the global batch however it is cut.
"""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from gem_ds.batches import Batches
from gem_ds.calibrate import SummedLoss
from gem_ds.checkpoint import TrainerState
from gem_ds.comm import Comm
from gem_ds.entries import SelectedEntries
from gem_ds.reporting import Reporter


class StopSignal:
    """Remembers a SIGTERM (a scheduler's notice) until the loop reaches the end of its step.

    Only within its block; before and after it there is nothing to save, and SIGTERM ends the
    process as ever.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopSignal:
        self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.received = True


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """After how many steps what happens; None for never."""

    log: int
    evaluate: int | None
    save: int | None


class DivergedError(ValueError):
    """The loss or the gradient is no longer finite."""


def seed_noise(seed: int, step: int, rank: int) -> None:
    """Key dropout's noise by (seed, step, rank), so that a resumed run draws the same."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fit(
    entries: SelectedEntries,
    train: Batches,
    summed_loss: SummedLoss,
    scheduler: Any,
    state: TrainerState,
    *,
    seed: int,
    intervals: Intervals,
    reporter: Reporter,
    evaluate: Callable[[], dict[str, float]],
    save: Callable[[], None],
    log_extra: Callable[[], dict[str, float]] = dict,
) -> bool:
    """Train from ``state.global_step`` to ``state.max_steps``.

    Args:
        entries: what is trained; masters and weights must agree.
        train: the training data.
        summed_loss: the loss of one micro-batch, summed over its answer tokens.
        scheduler: a torch learning-rate scheduler over the engine's optimizer; stepped after each
            applied step.
        state: progress; updated in place.
        seed: of dropout.
        intervals: when to log, evaluate and save.
        reporter: shows and records.
        evaluate: returns held-out metrics; called on all ranks.
        save: writes a checkpoint of the present state; called on all ranks.
        log_extra: more numbers for each log entry; called on all ranks.

    Returns:
        False if a SIGTERM ended the run early (a checkpoint of its last step was saved).

    Raises:
        DivergedError: the loss or gradient is not finite; the last checkpoint is from before.
    """
    engine, comm = entries.engine, entries.engine.comm
    losses: list[float] = []
    reporter.start()
    with StopSignal() as stop, entries.layers.sinks(entries.sinks()):
        while state.global_step < state.max_steps:
            step = state.global_step
            engine.model.train()
            seed_noise(seed, step, comm.rank)
            loss = _accumulate(entries, train, summed_loss, step)
            total, stopping = comm.all_reduce(
                torch.tensor([loss, float(stop.received)], dtype=torch.float64, device=comm.device),
                "sum",
            ).tolist()
            if not math.isfinite(total):
                with comm.in_unison():
                    raise DivergedError(_diverged("loss", step))
            applied = engine.step()
            if not applied and engine.dtype != torch.float16:  # fp16 lowers its loss scale
                with comm.in_unison():
                    raise DivergedError(_diverged("gradient", step))
            learning_rate = scheduler.get_last_lr()[0]
            if applied:
                entries.write_back()
                scheduler.step()
            state.global_step += 1
            state.epoch = state.global_step / train.steps_per_epoch
            losses.append(total)
            reporter.advance(train.num_tokens(step))
            if _due(state, intervals.log):
                entry = {"loss": sum(losses) / len(losses), "learning_rate": learning_rate}
                if engine.grad_norm is not None and math.isfinite(engine.grad_norm):
                    entry["grad_norm"] = engine.grad_norm
                entry["tokens_per_second"] = reporter.tokens_per_second()
                log_together(reporter, comm, entry | log_extra())
                losses.clear()
            if _due(state, intervals.evaluate):
                log_together(reporter, comm, evaluate())
            if stopping or _due(state, intervals.save):
                save()
            if stopping:
                break
    return state.global_step >= state.max_steps


def _accumulate(
    entries: SelectedEntries, train: Batches, summed_loss: SummedLoss, step: int
) -> float:
    """Run the backward of a global batch; this rank's part of its mean loss."""
    engine = entries.engine
    weight = 1.0 / train.num_answer_tokens(step)
    total = torch.zeros((), device=engine.device)
    for i, batch in enumerate(train.micro_batches(step)):

        def scaled_loss(model: nn.Module, batch: dict[str, Tensor] = batch) -> Tensor:
            return summed_loss(model, batch) * (weight * engine.comm.world_size)

        total += engine.backward(scaled_loss, deliver=i == train.num_micro_batches - 1)
    return total.item() / engine.comm.world_size


def mean_loss(entries: SelectedEntries, batches: Batches, summed_loss: SummedLoss) -> float:
    """Loss per answer token over one epoch of ``batches``, without gradients; same on all ranks."""
    engine = entries.engine
    engine.model.eval()
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    with torch.no_grad():
        for step in range(batches.steps_per_epoch):
            for batch in batches.micro_batches(step):
                total += summed_loss(engine.model, batch)
    engine.comm.all_reduce(total, "sum")
    return total.item() / batches.dataset.total_answer_tokens


def log_together(reporter: Reporter, comm: Comm, entry: dict[str, float]) -> None:
    """Log on all ranks; where the file cannot be written, all of them stop."""
    with comm.agreement():
        reporter.log(entry)


def _due(state: TrainerState, interval: int | None) -> bool:
    if interval is None:
        return False
    return state.global_step % interval == 0 or state.global_step == state.max_steps


def _diverged(what: str, step: int) -> str:
    return (
        f"The {what} is not finite at step {step + 1}: lower --learning_rate, or use --bf16 "
        "instead of --fp16; checkpoints saved so far are whole."
    )
