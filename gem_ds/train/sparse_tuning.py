"""Fine-tuning selected entries: calibrate or take up a mask, keep checkpoints, write the delta."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from gem_ds.data.batches import Batches, SummedLoss
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.engine import Engine
from gem_ds.distributed.weights import numel
from gem_ds.files.checkpoint import Checkpoint, TrainerState
from gem_ds.files.delta import Delta
from gem_ds.files.mask import Mask, dtype_name
from gem_ds.models.targets import head_layers as layers_of_head
from gem_ds.models.targets import targets_of
from gem_ds.progress import Progress
from gem_ds.select.rules import CALIBRATED_METHODS
from gem_ds.select.selection import Selection
from gem_ds.sparse.calibrate import calibrate
from gem_ds.sparse.entries import HeadEntries, SelectedEntries, gather_indices
from gem_ds.sparse.gradients import buffered_layers
from gem_ds.sparse.layers import TargetLayers, drop
from gem_ds.train.config import Arguments
from gem_ds.train.head_first import trained_head
from gem_ds.train.optimizer import make_sparse_optimizer
from gem_ds.train.prepare import PreparedRun
from gem_ds.train.reporting import Reporter
from gem_ds.train.results import make_mask
from gem_ds.train.summary import (
    NEARLY_ZERO,
    budget_table,
    changed_share,
    kernel_counts,
    selection_shape,
)


def sparse_layers(
    model: nn.Module, targets: Sequence[str], budget: int, head: Sequence[str]
) -> tuple[TargetLayers, TargetLayers | None]:
    """The layers that entries are selected from, and those of the head if there is one."""
    layers = TargetLayers(model, targets_of(model, targets), budget)
    if not head:
        return layers, None
    size = sum(numel(model.get_parameter(name)) for name in head)
    return layers, TargetLayers(model, layers_of_head(model, head), size, "gem_head")


class SparseTuning:
    """The selected entries of a frozen model, and all entries of its head if it has one.

    Attributes:
        entries: what is trained of the target layers, once it is selected.
        base: [K] on the CPU, the selected weights before training, in the model's dtype.
        mask: the same entries as the file that a later user reads.
        selection: what was selected, without the indices; None where a mask said it.
        calibration_seconds: what selecting took.
    """

    entries: SelectedEntries
    base: Tensor
    mask: Mask

    def __init__(
        self,
        args: Arguments,
        prepared: PreparedRun,
        model: PreTrainedModel,
        head: list[str],
        comm: Comm,
    ) -> None:
        self.args, self.prepared, self.comm = args, prepared, comm
        self.layers, head_layers = sparse_layers(model, prepared.targets, prepared.budget, head)
        vectors = [self.layers.vector]
        if head_layers is not None:
            vectors.append(head_layers.vector)
        optimizer = make_sparse_optimizer(args.train)
        self.engine = Engine(model, vectors, optimizer, prepared.deepspeed, comm)
        self.head = HeadEntries(self.engine, head_layers) if head_layers is not None else None
        self.calibration_seconds = 0.0
        self.selection: Selection | None = None

    @property
    def parts(self) -> list[SelectedEntries | HeadEntries]:
        """The flat vectors that are trained."""
        return [self.entries, self.head] if self.head is not None else [self.entries]

    @property
    def num_trainable(self) -> int:
        """Trained numbers, the head's included."""
        return sum(part.num_entries for part in self.parts)

    def numbers(self) -> dict[str, float]:
        """What the log tells of the present step: how many selected weights have changed so far."""
        return {"changed_share": changed_share(self.entries.values().cpu(), self.base)}

    # Before the first step

    def start(self, batches: Batches, summed_loss: SummedLoss, *, is_shown: bool = False) -> None:
        """Select the entries, or take up the mask's; then go to where the checkpoint stopped."""
        prepared = self.prepared
        if prepared.mask is None:
            started = time.perf_counter()
            selection = self._select(batches, summed_loss, is_shown)
            indices = gather_indices(selection.indices, self.comm)
            self.selection = replace(selection, indices=[])
            self.calibration_seconds = time.perf_counter() - started
        else:
            indices = [prepared.mask.indices[layer.name] for layer in self.layers]
        self.entries = SelectedEntries(
            self.engine, self.layers, indices, self.args.method.sddmm_kernel
        )
        self.base = self.entries.start_from_weights().cpu()
        if self.head is not None:
            self.head.start_from_weights()
        if prepared.mask is not None:
            with self.comm.in_unison():
                prepared.mask.check_base(self.entries.split(self.base))
        self.mask = make_mask(self.args, prepared, self.entries, self.base)
        if prepared.checkpoint is not None:
            self._resume(prepared.checkpoint)
        with self.comm.agreement():
            if self.comm.is_main:
                self.mask.save(prepared.output_dir / "mask.safetensors")

    def _select(
        self, batches: Batches, summed_loss: SummedLoss, is_shown: bool = False
    ) -> Selection:
        """Score and select."""
        method = self.args.method.method
        is_shown = is_shown and method in CALIBRATED_METHODS
        with ExitStack() as stack:
            if method in CALIBRATED_METHODS:
                stack.enter_context(self.calibrating(batches, summed_loss))
            progress = Progress("Calibrating", batches.steps_per_epoch, "batch", is_shown=is_shown)
            stack.callback(progress.close)
            return calibrate(
                self.engine,
                self.layers,
                batches,
                summed_loss,
                self.prepared.budget,
                progress=progress.advance,
                rule=method,
                seed=self.args.train.seed,
                buffer_gb=self.args.method.calibration_buffer_gb,
            )

    @contextmanager
    def calibrating(self, batches: Batches, summed_loss: SummedLoss) -> Iterator[None]:
        """While the block lasts, a head is one that was trained, and its gradient is dropped."""
        if self.head is None:
            yield
            return
        with ExitStack() as stack:
            if num_steps := self.args.method.head_steps:
                rate, seed = self.args.train.head_learning_rate, self.args.train.seed
                engine, layers, head = self.engine, self.layers, self.head
                stack.enter_context(
                    trained_head(
                        engine, layers, head, batches, summed_loss, num_steps, rate, seed=seed
                    )
                )
            stack.enter_context(self.head.layers.sinks([drop] * len(self.head.layers)))
            yield

    def describe(self, reporter: Reporter) -> dict[str, float]:
        """Say what will be trained; returns how the selection lies, for the log."""
        prepared = self.prepared
        budgets = [index.numel() for index in self.entries.flat_indices]
        shape = selection_shape(budgets, self.base) | {"num_trainable": self.num_trainable}
        if (selection := self.selection) is not None:
            rows = zip(
                selection.names, selection.numels, budgets, selection.layer_scores, strict=True
            )
            method = self.args.method
            is_calibrated = method.method in CALIBRATED_METHODS
            if self.head is not None and is_calibrated and method.head_steps:
                reporter.say(
                    f"Calibrated with a head that was trained for {method.head_steps} steps "
                    "(--calibration_head_steps); training starts from its first values"
                )
            reporter.say(f"Where the budget went:\n{budget_table(rows)}")
            if is_calibrated and (buffer_gb := method.calibration_buffer_gb):
                partitions = [
                    self.engine.weights.partition_size(layer.weight) for layer in self.layers
                ]
                num_buffered = len(buffered_layers(partitions, self.comm.world_size, buffer_gb))
                reporter.say(
                    f"{num_buffered} of {len(budgets)} target layers were buffered in calibration "
                    f"(--calibration_buffer_gb {buffer_gb:g})"
                )
        dtype = dtype_name(self.engine.dtype)
        if prepared.mask is not None and (other := prepared.mask.dtype) != dtype:
            reporter.say(
                f"The mask was made in {other} and this run is in {dtype}, so it could not be "
                "checked that the base values are the same"
            )
        reporter.say(
            f"Training {prepared.budget:,} of {prepared.num_parameters:,} parameters "
            f"(density {prepared.budget / prepared.num_parameters:.4%})"
            + (f" and a head of {self.head.num_entries:,}" if self.head is not None else "")
            + f"; optimizer state on this rank: {self.engine.optimizer_state_bytes():,} bytes"
        )
        reporter.say(f"Kernels of the sampled gradient: {kernel_counts(self.entries.kernels())}")
        reporter.say(
            f"The budget is as concentrated as if {shape['effective_layers']:.1f} of the "
            f"{len(budgets)} layers shared it equally; {shape['selected_near_zero']:,} selected "
            f"weights are nearly zero (below {NEARLY_ZERO:g})"
        )
        return shape

    # Files

    def save_checkpoint(self, state: TrainerState) -> None:
        """Write a checkpoint of the present state; called on all ranks."""
        vectors = self.engine.get_state()
        head = {} if self.head is None else self.engine.get_state(self.head.vector)
        with self.comm.agreement():
            if self.comm.is_main:
                Checkpoint(
                    mask=self.mask,
                    vectors=vectors,
                    head_vectors=head,
                    num_updates=self.engine.num_updates,
                    loss_scale=self.engine.loss_scale,
                    identity=self.prepared.identity,
                    state=state,
                ).save(self.prepared.output_dir)

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Go to where a checkpoint stopped."""
        self.engine.set_state(checkpoint.vectors, checkpoint.num_updates)
        if self.head is not None:
            with self.comm.in_unison():
                if checkpoint.head_size != self.head.num_entries:
                    raise ValueError(
                        f"The checkpoint has a head of {checkpoint.head_size:,} numbers and the "
                        f"model one of {self.head.num_entries:,}: pass the task that it was "
                        "trained on."
                    )
            self.engine.set_state(
                checkpoint.head_vectors, checkpoint.num_updates, vector=self.head.vector
            )
        self.engine.loss_scale = checkpoint.loss_scale
        for part in self.parts:
            part.write_back()
        checkpoint.vectors.clear()  # `prepared` lasts as long as the run
        checkpoint.head_vectors.clear()

    def save_weights(self) -> None:
        """Write the delta; called on all ranks."""
        values = self.entries.split(self.entries.values().cpu())
        head = {}
        if self.head is not None:
            parts = self.head.split(self.head.values().cpu())
            head = {
                name: part.view(shape)
                for (name, part), shape in zip(parts.items(), self.head.shapes, strict=True)
            }
        with self.comm.agreement():
            if self.comm.is_main:
                delta = Delta(mask=self.mask, values=values, head=head)
                delta.save(self.prepared.output_dir / "delta.safetensors")
