"""DeepSpeed around a model: engines that step.

An :class:`Engine` holds a frozen model and is given flat vectors to train: the selected entries of
the target layers, [K], and where a task head is trained whole a second one. What the trainer needs
beyond ``forward``, ``backward`` and ``step`` is here, for every ZeRO stage: *masters*, the fp32
values and moments of a flat vector, are read and set as a whole. Reading and writing the frozen
weights is the business of its :class:`Weights`. A :class:`DenseEngine` trains parameters of the
model themselves, for what GEM is compared with.

A fact of DeepSpeed 0.19, held by ``tests/distributed/test_engine.py``: a stage-0 bf16 engine calls
``optimizer.step()`` once while it is made; :meth:`Engine.set_state` afterwards sets masters,
moments and step count, so nothing of it remains.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.optim import STATE_KEYS, SparseAdamW
from gem_ds.distributed.weights import Weights, load_deepspeed


class FlatVector(Protocol):
    """A flat vector that an engine trains; :class:`gem_ds.sparse.flat_values.FlatValues` is one.

    Attributes:
        values: [K] in the model's dtype.
        delivers: whether the next backward gives ``values`` the gradient that was collected.
    """

    values: nn.Parameter
    delivers: bool


def prepare_inference(model: nn.Module, config: dict[str, Any]) -> None:
    """Let a partitioned model gather each weight where a forward pass needs it, and free it again.

    Args:
        model: as loaded within :func:`distributed.weights.partitioned_loading`; is put into eval
            mode.
        config: the same configuration, which names no optimizer.
    """
    engine, *_ = load_deepspeed().initialize(model=model, config=config)
    engine.eval()


@dataclass(frozen=True)
class _Fragment:
    """This rank's part of a flat fp32 vector that the optimizer steps.

    ``owner[offset : offset + length]`` holds entries ``start`` to ``start + length`` of ``values``.
    """

    owner: Tensor
    offset: int
    start: int
    length: int


class BaseEngine:
    """An engine that steps; what it trains and how its backward runs is the subclasses' business.

    Args:
        model: with what is to be trained.
        optimizer: of that.
        config: a resolved DeepSpeed configuration (:func:`distributed.zero_config.resolve_config`).
        comm: the ranks.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, config: dict[str, Any], comm: Comm
    ) -> None:
        self.comm = comm
        self.optimizer = optimizer
        self._trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._engine, *_ = load_deepspeed().initialize(
            model=model, model_parameters=self._trained, optimizer=optimizer, config=config
        )
        self.model: nn.Module = self._engine.module
        self.stage: int = self._engine.zero_optimization_stage()
        self.device = comm.device
        self.weights = Weights(comm, self.stage, self._let_gathers_wait)
        self.dtype: torch.dtype = next(self.model.parameters()).dtype
        self._scaler = self._engine.optimizer.loss_scaler if self._engine.fp16_enabled() else None
        if self._scaler is not None and self._scaler.dynamic:
            self._scaler.raise_error_at_min_scale = False  # the caller sees that it cannot go on

    def step(self) -> bool:
        """Apply the delivered gradient, unless an entry of it is not finite on some rank.

        Returns:
            False where the step was skipped: masters, moments and ``num_updates`` are as before.
        """
        if self._engine.optimizer is self.optimizer:  # fp32 at stage 0: DeepSpeed checks nothing
            gradients = [p.grad for p in self._trained if p.grad is not None]
            assert gradients, "a step follows a backward that delivers"
            if not get_total_norm(gradients, norm_type=float("inf")).isfinite():
                for parameter in self._trained:
                    parameter.grad = None
                return False
        self._engine.step()
        return bool(self._engine.was_step_applied())

    @property
    def grad_norm(self) -> Tensor | float | None:
        """The gradient's L2 norm before clipping in the last step, where the stage computes it.

        Whoever turns it into a number waits for the device.
        """
        norm: Tensor | float | None = self._engine.get_global_grad_norm()
        return norm

    @property
    def lowers_loss_scale(self) -> bool:
        """Whether a gradient that is not finite would lower the loss scale: fp16's, if dynamic."""
        scaler = self._scaler
        return scaler is not None and scaler.dynamic and scaler.cur_scale > scaler.min_scale

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by before the backward (1 except under fp16)."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0) or 1.0)

    @loss_scale.setter
    def loss_scale(self, scale: float) -> None:
        if self._engine.fp16_enabled():
            self._engine.optimizer.loss_scale = scale

    def _let_gathers_wait(self) -> None:
        """ZeRO-3 gathers on a stream of its own: it is to read a partition after it was written."""
        offload = self._engine.optimizer.parameter_offload
        stream = offload._DeepSpeedZeRoOffload__allgather_stream
        if stream is not None:  # None where the device has no streams
            stream.wait_stream(load_deepspeed().accelerator.get_accelerator().current_stream())


class Engine(BaseEngine):
    """An engine of a frozen model, for calibration and for training flat vectors.

    Args:
        model: frozen, with the vectors as submodules (:class:`gem_ds.sparse.layers.TargetLayers`).
        vectors: what is trained; the first is that of the selected entries.
        optimizer: makes the client optimizer of their parameters, given in the same order, each in
            a parameter group of its own.
        config: a resolved DeepSpeed configuration (:func:`distributed.zero_config.resolve_config`).
        comm: the ranks.
    """

    optimizer: SparseAdamW

    def __init__(
        self,
        model: nn.Module,
        vectors: Sequence[FlatVector],
        optimizer: Callable[[list[nn.Parameter]], SparseAdamW],
        config: dict[str, Any],
        comm: Comm,
    ) -> None:
        self.vectors = list(vectors)
        super().__init__(model, optimizer([vector.values for vector in vectors]), config, comm)

    # Forward and backward

    def backward(
        self,
        compute_loss: Callable[[nn.Module], Tensor],
        *,
        deliver: bool,
        loss_scale: float | None = None,
    ) -> Tensor:
        """Run one micro-batch; the sinks of the target layers receive what its backward knows.

        Args:
            compute_loss: calls the model that it is given once, returns a scalar.
            deliver: whether the collected gradient of ``values`` goes to the optimizer with it;
                True for the last micro-batch of a global batch only.
            loss_scale: multiplies the loss before a backward that delivers nothing (default: the
                optimizer's, so that micro-batches of one global batch add up).

        Returns:
            The detached loss.
        """
        for vector in self.vectors:
            vector.delivers = deliver
        if deliver:
            loss = compute_loss(self._engine)
            self._engine.backward(loss)
        else:  # the engine does not see it: frozen weights need nothing of it but ZeRO-3's hooks
            loss = compute_loss(self.model)
            (loss * (self.loss_scale if loss_scale is None else loss_scale)).backward()
            if self.stage == 3:
                self._engine.optimizer.parameter_offload.release_backward_leftovers()
        return loss.detach()

    # The flat vectors: parameter, masters, moments

    def gather_values(self, vector: FlatVector | None = None) -> Tensor:
        """``values`` [K] of a vector (the first) in the model's dtype, whole, on every rank."""
        return self.weights.read_whole((vector or self.vectors[0]).values)

    def get_state(self, vector: FlatVector | None = None) -> dict[str, Tensor]:
        """Masters and moments by ``optim.STATE_KEYS``: fp32 [K] on the CPU, on all ranks.

        One of them at a time is whole on the device.
        """
        fragment = self._fragment(vector or self.vectors[0])
        state = self.optimizer.state[fragment.owner] or self.optimizer.reset_state(fragment.owner)
        return {
            key: self._gather(fragment, fragment.owner if key == "master" else state[key]).cpu()
            for key in STATE_KEYS
        }

    @property
    def num_updates(self) -> int:
        """Optimizer updates applied so far."""
        return int(self.optimizer.state[self._fragment(self.vectors[0]).owner].get("step", 0))

    def set_state(
        self, state: Mapping[str, Tensor], num_updates: int, vector: FlatVector | None = None
    ) -> None:
        """Set masters and moments from whole fp32 vectors [K], and ``values`` from the masters."""
        vector = vector or self.vectors[0]
        fragment = self._fragment(vector)
        own = slice(fragment.start, fragment.start + fragment.length)
        place = slice(fragment.offset, fragment.offset + fragment.length)
        moments = self.optimizer.reset_state(fragment.owner)
        moments["step"] = num_updates
        for key in STATE_KEYS:
            target = fragment.owner.data if key == "master" else moments[key]
            target.zero_()[place] = state[key][own].to(target.device)
        self.weights.write_whole(vector.values, state["master"].to(self.device))

    def optimizer_state_bytes(self) -> int:
        """Bytes of masters and moments that this rank holds, measured on the tensors."""
        return _bytes_of(self.optimizer, [self._fragment(vector).owner for vector in self.vectors])

    def _gather(self, fragment: _Fragment, part: Tensor) -> Tensor:
        part = part.detach().view(-1)[fragment.offset : fragment.offset + fragment.length]
        part = part.to(self.device)
        if self.stage == 0:
            return part.clone()
        return torch.cat(self.comm.all_gather(part))

    def _fragment(self, vector: FlatVector) -> _Fragment:
        """Where the masters of ``values`` are kept; the one place that reads DeepSpeed's layout.

        Every vector's parameter is a parameter group of its own.
        """
        optimizer, values = self._engine.optimizer, vector.values
        group = self.vectors.index(vector)
        if self.stage == 3:
            owner = optimizer.fp32_partitioned_groups_flat[group]
            start, stop = self.weights.shard_range(values)
            return _Fragment(owner, 0, start, stop - start)
        if self.stage > 0:
            owner = optimizer.single_partition_of_fp32_groups[group]
            mapping = values._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # fewer entries than ranks: this rank has none
                return _Fragment(owner, 0, 0, 0)
            low, high = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            return _Fragment(owner, high.start, low.start, low.numel)
        groups = getattr(optimizer, "fp32_groups", None)  # a bf16 engine's; fp32 has no copy
        owner = groups[group][0] if groups else values
        return _Fragment(owner, 0, 0, values.numel())


class DenseEngine(BaseEngine):
    """An engine that trains parameters of the model themselves, as DeepSpeed does it.

    Args:
        model: with the parameters of ``optimizer`` among its own; the others are frozen.
        optimizer: of the trained parameters.
        config: a resolved DeepSpeed configuration.
        comm: the ranks.
    """

    def backward(self, compute_loss: Callable[[nn.Module], Tensor], *, deliver: bool) -> Tensor:
        """Run one micro-batch; the engine accumulates the gradients.

        Args:
            compute_loss: calls the model that it is given once, returns a scalar.
            deliver: True for the last micro-batch of a global batch only.

        Returns:
            The detached loss.
        """
        self._engine.set_gradient_accumulation_boundary(deliver)
        loss = compute_loss(self._engine)
        self._engine.backward(loss)
        return loss.detach()

    def optimizer_state_bytes(self) -> int:
        """Bytes of masters and moments that this rank holds, measured on the tensors.

        They exist from the first step on. An fp32 run at stage 0 has no masters beside the
        parameters; these are counted all the same.
        """
        return _bytes_of(self.optimizer, list(self.optimizer.state))

    def whole_parameters(self, names: Collection[str]) -> dict[str, Tensor]:
        """Copies of parameters on the CPU, whole, on rank 0; on other ranks there are none."""
        named = dict(self.model.named_parameters())
        found = {}
        for name in names:
            whole = self.weights.read_whole(named[name])
            if self.comm.is_main:
                found[name] = whole.cpu().clone()
        return found


def _bytes_of(optimizer: Optimizer, masters: Sequence[Tensor]) -> int:
    """Bytes of masters and of what the optimizer keeps for them, measured on the tensors."""
    tensors = list(masters)
    for master in masters:
        tensors += [t for t in optimizer.state[master].values() if torch.is_tensor(t)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
