"""Fine-tuning selected entries: calibrate or take up a mask, keep checkpoints, write the delta."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gem_ds.calibration.calibrate import calibrate
from gem_ds.calibration.gradients import auto_buffer_gb
from gem_ds.data.batches import Batches, SummedLoss
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.engine import Engine
from gem_ds.distributed.memory import free_bytes
from gem_ds.distributed.weights import numel, shape_of
from gem_ds.files.checkpoint import Checkpoint, TrainerState
from gem_ds.files.delta import Delta
from gem_ds.files.fingerprint import fingerprints
from gem_ds.files.manifest import claim
from gem_ds.files.mask import Mask, WeightInfo
from gem_ds.models.targets import head_layers as layers_of_head
from gem_ds.models.targets import targets_of
from gem_ds.progress import Progress
from gem_ds.select.rules import CALIBRATED_METHODS
from gem_ds.select.selection import Selection, gather_indices
from gem_ds.sparse.entries import HeadEntries, SelectedEntries
from gem_ds.sparse.layers import NoGradient
from gem_ds.sparse.target_layers import TargetLayers
from gem_ds.train.fit import DivergedError, accumulate, seed_noise
from gem_ds.train.optimizer import make_sparse_optimizer
from gem_ds.train.prepare import PreparedRun
from gem_ds.train.results import make_mask
from gem_ds.train.targets import Targets

_CHUNK = 2**22  # entries compared at a time


def sparse_layers(
    model: nn.Module, targets: Targets, head: Sequence[str]
) -> tuple[TargetLayers, TargetLayers | None]:
    """The layers that entries are selected from, and those of the head if there is one."""
    layers = TargetLayers(model, targets_of(model, targets.names), targets.budget)
    if not head:
        return layers, None
    size = sum(numel(model.get_parameter(name)) for name in head)
    return layers, TargetLayers(model, layers_of_head(model, head), size, "gem_head")


class SparseTuning:
    """The selected entries of a frozen model, and all entries of its head if it has one."""

    entries: SelectedEntries  # what is trained of the target layers, once it is selected
    #: On the CPU: the selected weights before training, this rank's range of ``values`` of them.
    base: Tensor
    mask: Mask  # the same entries as the file that a later user reads; on rank 0 alone
    selection: Selection | None = None  # without the indices; None where a mask says them
    calibration_seconds = 0.0
    buffer_gb = 0.0  # 10^9 bytes that whole gradients could take in calibration

    def __init__(
        self, prepared: PreparedRun, model: PreTrainedModel, head: list[str], comm: Comm
    ) -> None:
        self.args, self.prepared, self.comm = prepared.args, prepared, comm
        self.layers, head_layers = sparse_layers(model, prepared.targets, head)
        vectors = [part.vector for part in (self.layers, head_layers) if part is not None]
        optimizer = partial(make_sparse_optimizer, prepared.args.train)
        self.engine = Engine(model, vectors, optimizer, prepared.deepspeed, comm)
        self.head = None if head_layers is None else HeadEntries(self.engine, head_layers)
        parameters = {} if self.head is None else self.head.parameters
        self.head_shapes = {name: shape_of(p) for name, p in parameters.items()}

    @property
    def parts(self) -> list[SelectedEntries | HeadEntries]:
        """The flat vectors that are trained."""
        return [self.entries, self.head] if self.head is not None else [self.entries]

    @property
    def num_trainable(self) -> int:
        """Trained numbers, the head's included."""
        return sum(part.num_entries for part in self.parts)

    def changed_share(self) -> float:
        """Share of the selected weights that differ from the base, in the model's dtype."""
        engine, values = self.engine, self.entries.vector.values
        own = engine.weights.read_shard(values).split(_CHUNK)
        pairs = zip(own, self.base.split(_CHUNK), strict=True)
        differing = (part.cpu() != before for part, before in pairs)
        num_changed = torch.tensor(sum(int(part.count_nonzero()) for part in differing))
        total = self.comm.all_reduce(num_changed.to(engine.device), "sum").item()
        return float(total / self.entries.num_entries)

    def whole_base(self) -> dict[str, Tensor]:
        """By weight the values before training at the entries; on rank 0, but all call it."""
        parts = self.comm.gather(self.base.to(self.engine.device))
        return self.entries.split(torch.cat([part.cpu() for part in parts])) if parts else {}

    # Before the first step

    def start(self, batches: Batches, summed_loss: SummedLoss) -> None:
        """Select the entries, or take up the mask's; then go to where the checkpoint stopped."""
        prepared = self.prepared
        if prepared.mask is None:
            started = time.perf_counter()
            selection = self.select(batches, summed_loss)
            indices = gather_indices(selection.indices, self.comm)
            self.selection = replace(selection, indices=[])
            del selection
            self.calibration_seconds = time.perf_counter() - started
        else:
            indices = [prepared.mask.indices[layer.name] for layer in self.layers]
        self.entries = SelectedEntries(
            self.engine, self.layers, indices, self.args.method.sddmm_kernel
        )
        del indices  # which the entries have
        values = self.entries.start_from_weights()
        own = slice(*self.engine.weights.shard_range(self.entries.vector.values))
        self.base = values[own].to("cpu", copy=True)
        if self.head is not None:
            self.head.start_from_weights()
        base = self.entries.split(values.cpu())
        found = self.fingerprints()
        if prepared.mask is not None:
            with self.comm.in_unison():
                prepared.mask.check_base(base)
                prepared.mask.check_rest(found)
        if isinstance(prepared.checkpoint, Checkpoint):
            self.restore(prepared.checkpoint)
        settings = (prepared.mask or self.selection).settings  # type: ignore[union-attr]
        if factors := settings.get("rate_factors"):
            self.entries.scale_rates(factors)
        with self.comm.agreement():
            if self.comm.is_main:
                indices_of = zip(base, self.entries.flat_indices, strict=True)
                self.mask = make_mask(
                    prepared,
                    {name: index.cpu() for name, index in indices_of},
                    {x.name: WeightInfo.of(x.shape, base[x.name]) for x in self.layers},
                    found,
                )
                if self.selection is not None:
                    self.mask.settings.update(self.selection.settings)
                self.mask.save(claim(prepared.output_dir, "mask.safetensors"))

    def select(self, batches: Batches, summed_loss: SummedLoss) -> Selection:
        """Score and select."""
        method = self.args.method
        is_calibrated = method.method in CALIBRATED_METHODS
        is_shown = self.comm.is_main and is_calibrated and not self.args.train.disable_tqdm
        with ExitStack() as stack:
            if is_calibrated:
                stack.enter_context(self.calibrating(batches, summed_loss))
                if (buffer_gb := method.fixed_buffer_gb) is None:  # the same on every rank
                    sizes = [self.engine.weights.partition_size(x.weight) for x in self.layers]
                    buffer_gb = auto_buffer_gb(free_bytes(self.comm), sizes)
                self.buffer_gb = buffer_gb
            progress = Progress("Calibrating", batches.steps_per_epoch, "batch", is_shown=is_shown)
            stack.callback(progress.close)
            return calibrate(
                self.engine,
                self.layers,
                batches,
                summed_loss,
                self.prepared.targets.budget,
                progress=progress.advance,
                rule=method.method,
                seed=self.args.train.seed,
                keep_zeros=method.keep_zeros,
                buffer_gb=self.buffer_gb,
            )

    @contextmanager
    def calibrating(self, batches: Batches, summed_loss: SummedLoss) -> Iterator[None]:
        """While the block lasts, a head is one that was trained, and its gradient is dropped."""
        if (head := self.head) is None:
            yield
            return
        if num_steps := self.args.method.head_steps:
            first = head.start_from_weights()
            self._train_head(head, batches, summed_loss, num_steps)
        with head.layers.sinks([NoGradient()] * len(head.layers)):
            yield
        if num_steps:
            head.start_from(first)
            head.write_back()

    def _train_head(
        self, head: HeadEntries, batches: Batches, summed_loss: SummedLoss, num_steps: int
    ) -> None:
        """Train the head alone, so that a calibration sees the gradients of a trained one.

        Those of a random head say mostly how often each label occurs. As linear probing before
        fine-tuning (Kumar et al., arXiv 2202.10054), but for the mask only. The optimizer is the
        engine's, its rates fall linearly to 0; they and fp16's loss scale are as before at the end.
        Masters and moments are left to who trains next.
        """
        engine, train = self.engine, self.args.train
        groups = engine.optimizer.param_groups
        rates, loss_scale = [group["lr"] for group in groups], engine.loss_scale
        engine.model.train()

        # A backward that delivers, delivers all vectors.
        sinks = [NoGradient(self.layers.vector)] * len(self.layers)
        with head.training(), self.layers.sinks(sinks):
            for step in range(num_steps):
                for group in groups:
                    group["lr"] = train.head_learning_rate * (1 - step / num_steps)
                seed_noise(train.seed, step, engine.comm.rank)
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

    def fingerprints(self) -> dict[str, str]:
        """Those of the base model's parameters, while they are the base's; called on all ranks."""
        vectors = {part.vector.values for part in self.parts}
        of_head = {} if self.head is None else self.head.parameters
        parameters = {
            name: parameter
            for name, parameter in self.engine.model.named_parameters()
            if parameter not in vectors and name not in of_head
        }
        return fingerprints(parameters, self.engine.weights.read_entries)

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
                    head_shapes=self.head_shapes,
                    num_updates=self.engine.num_updates,
                    loss_scale=self.engine.loss_scale,
                    identity=self.prepared.identity,
                    state=state,
                ).save(self.prepared.output_dir)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go to where a checkpoint of this run stopped; its vectors are consumed."""
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
        vectors = [part.values() for part in self.parts]
        with self.comm.agreement():
            if self.comm.is_main:
                pairs = zip(self.parts, vectors, strict=True)
                values, *of_head = [part.split(vector.cpu()) for part, vector in pairs]
                head = {n: of_head[0][n].view(shape) for n, shape in self.head_shapes.items()}
                delta = Delta(mask=self.mask, values=values, head=head)
                delta.save(claim(self.prepared.output_dir, "delta.safetensors"))
