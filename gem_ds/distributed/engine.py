"""DeepSpeed around a model: engines that step.

An :class:`Engine` holds a frozen model and is given flat vectors to train: the selected entries of
the target layers, [K], and where a task head is trained whole a second one. At every ZeRO stage
its fp32 *masters* and moments are read and set as a whole; reading and writing the frozen weights
is the business of its :class:`Weights`.

A fact of DeepSpeed 0.19, held by ``tests/distributed/test_engine.py``: a stage-0 bf16 engine calls
``optimizer.step()`` once while it is made; :meth:`Engine.set_state` afterwards sets masters,
moments and step count, so nothing of it remains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.optim import STATE_KEYS, SparseAdamW
from gem_ds.distributed.weights import Weights, load_deepspeed, numel


class FlatVector(Protocol):
    """A flat vector that an engine trains; :class:`gem_ds.sparse.flat_values.FlatValues` is one."""

    values: nn.Parameter  # [K] in the model's dtype
    delivers: bool  # whether the next backward gives it the gradient that was collected


def prepare_inference(model: nn.Module, config: dict[str, Any]) -> None:
    """Let a model that was loaded with ``config`` gather each weight where a forward needs it."""
    engine, *_ = load_deepspeed().initialize(model=model, config=config)
    engine.eval()


class BaseEngine:
    """An engine that steps; what it trains and how its backward runs is the subclasses' business.

    ``config`` is what :func:`gem_ds.distributed.zero_config.resolve_config` returns.
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

        Returns False where it was skipped: masters, moments and ``num_updates`` are as before.
        """
        if self._engine.optimizer is self.optimizer:  # fp32 at stage 0: DeepSpeed checks nothing
            gradients = [p.grad for p in self._trained if p.grad is not None]
            assert gradients, "a step follows a backward that delivers"
            if not get_total_norm(gradients, norm_type=float("inf")).isfinite():
                self.optimizer.zero_grad()
                return False
        self._engine.step()
        return bool(self._engine.was_step_applied())

    @property
    def grad_norm(self) -> Tensor | float | None:
        """The gradient's L2 norm before clipping in the last step, where the stage computes it.

        Whoever turns it into a number waits for the device.
        """
        return self._engine.get_global_grad_norm()  # type: ignore[no-any-return]

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

    def optimizer_state_bytes(self) -> int:
        """Bytes of masters and moments on this rank, measured on the tensors; 0 before they exist.

        In fp32 at stage 0 the masters are the parameters, which are counted all the same.
        """
        state = self.optimizer.state
        moments = [t for kept in state.values() for t in kept.values() if torch.is_tensor(t)]
        return sum(tensor.nbytes for tensor in (*state, *moments))

    def _let_gathers_wait(self) -> None:
        """ZeRO-3 gathers on a stream of its own: it is to read a partition after it was written."""
        offload = self._engine.optimizer.parameter_offload
        stream = offload._DeepSpeedZeRoOffload__allgather_stream
        if stream is not None:  # None where the device has no streams
            stream.wait_stream(load_deepspeed().accelerator.get_accelerator().current_stream())


class Engine(BaseEngine):
    """An engine of a frozen model, for calibration and for training flat vectors.

    The vectors are submodules of the model (:mod:`gem_ds.sparse.target_layers`), that of the
    selected entries is the first; ``optimizer`` makes a parameter group of each.
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

    def module(self, *, deliver: bool) -> nn.Module:
        """What to call, once, for a micro-batch whose loss goes to :meth:`backward`.

        The last one of a global batch delivers the collected gradient to the optimizer. The engine
        does not see the others: frozen weights need nothing of it but ZeRO-3's hooks.
        """
        for vector in self.vectors:
            vector.delivers = deliver
        self._delivers = deliver
        return self._engine if deliver else self.model

    def backward(self, loss: Tensor, *, loss_scale: float | None = None) -> None:
        """The backward of a scalar; the sinks of the target layers receive what it knows.

        ``loss_scale`` multiplies a loss that delivers nothing (default: the optimizer's, so that
        micro-batches add up).
        """
        if self._delivers:
            self._engine.backward(loss)
            return
        (loss * (self.loss_scale if loss_scale is None else loss_scale)).backward()
        if self.stage == 3:
            self._engine.optimizer.parameter_offload.release_backward_leftovers()

    def gather_values(self, vector: FlatVector | None = None) -> Tensor:
        """``values`` [K] of a vector (the first) in the model's dtype, whole, on every rank."""
        return self.weights.read_whole((vector or self.vectors[0]).values)

    def get_state(self, vector: FlatVector | None = None) -> dict[str, Tensor]:
        """Masters and moments by ``optim.STATE_KEYS``: fp32 [K] on the CPU, on rank 0.

        One of them at a time is whole on its device. On other ranks there are none; all call it.
        What lies on the CPU whole is no copy: use it before the next step.
        """
        masters, place, _ = self._masters(vector or self.vectors[0])
        moments = self.optimizer.state[masters] or self.optimizer.reset_state(masters)
        parts = {**moments, "master": masters.detach()}
        state = {}
        for key in STATE_KEYS:
            own = parts[key].view(-1)[place]
            # At stage 0 each rank holds all of it.
            found = [own] if self.stage == 0 else self.comm.gather(own.to(self.device))
            if self.comm.is_main:
                state[key] = (found[0] if len(found) == 1 else torch.cat(found)).cpu()
        return state

    @property
    def num_updates(self) -> int:
        """Optimizer updates applied so far."""
        masters, *_ = self._masters(self.vectors[0])
        return int(self.optimizer.state[masters].get("step", 0))

    def set_state(
        self, state: Mapping[str, Tensor], num_updates: int, vector: FlatVector | None = None
    ) -> None:
        """Set masters and moments from whole vectors [K], and ``values`` from the masters."""
        vector = vector or self.vectors[0]
        masters, place, own = self._masters(vector)
        moments = self.optimizer.reset_state(masters)
        moments["step"] = num_updates
        for key in STATE_KEYS:
            target = masters.data if key == "master" else moments[key]
            target.zero_()[place] = state[key][own].to(target.device)
        self.weights.write_whole(vector.values, state["master"].to(self.device))

    def update_pieces(
        self, pieces: Sequence[tuple[int, int, float, int | None]], vector: FlatVector | None = None
    ) -> None:
        """Let updates from now on change what these pieces of a vector (the first) cover, no more.

        A piece is the entries from ``start`` to ``stop``, what their learning rate is multiplied
        by, and the number of their next update (None: that of the vector's).
        """
        vector = vector or self.vectors[0]
        masters, place, own = self._masters(vector)
        low, high, _ = own.indices(numel(vector.values))
        shift = place.indices(masters.numel())[0] - low
        state = self.optimizer.state[masters] or self.optimizer.reset_state(masters)
        state["pieces"] = [
            (slice(max(start, low) + shift, min(stop, high) + shift), factor, number)
            for start, stop, factor, number in pieces
            if max(start, low) < min(stop, high)
        ]

    def _masters(self, vector: FlatVector) -> tuple[Tensor, slice, slice]:
        """The fp32 vector that the optimizer steps; its ``[place]`` holds ``values[own]``.

        The one place that reads DeepSpeed's layout. A vector's parameter is a group of its own.
        """
        optimizer, values = self._engine.optimizer, vector.values
        group = self.vectors.index(vector)
        if self.stage == 3:
            start, stop = self.weights.shard_range(values)
            masters = optimizer.fp32_partitioned_groups_flat[group]
            return masters, slice(stop - start), slice(start, stop)
        if self.stage > 0:
            masters = optimizer.single_partition_of_fp32_groups[group]
            mapping = values._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # fewer entries than ranks: this rank has none
                return masters, slice(0), slice(0)
            low, high = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            place = slice(high.start, high.start + low.numel)
            return masters, place, slice(low.start, low.start + low.numel)
        groups = getattr(optimizer, "fp32_groups", None)  # a bf16 engine's; fp32 has no copy
        return groups[group][0] if groups else values, slice(None), slice(None)
