"""DeepSpeed around a model: the door to deepspeed, but for joining the ranks.

An :class:`Engine` holds a frozen model and is given flat vectors to train: ``gate.values`` [K], and
where a task head is trained whole a second one. What the trainer needs beyond ``forward``,
``backward`` and ``step`` is here, for every ZeRO stage:

* *ranges*: which contiguous flat range of a weight this rank scores,
* *reading* that range and *writing* updated entries back into the weights,
* *masters*: the fp32 values and moments of a flat vector, read and set as a whole.

Facts of DeepSpeed 0.19 that this file rests on, each held by ``tests/distributed/test_engine.py``:

* ZeRO-3 cuts a weight of n entries into ranges of ``ceil(n / world_size)``; the padding of the last
  one is uninitialised memory.
* Parameters below the persistence threshold keep a full copy in ``param.data`` between steps, and a
  forward pass in train mode without gradients can leave copies of any: writing updates them too.
* ZeRO-3 gathers weights on a stream of its own, which does not wait for what others have written.
* A stage-0 bf16 engine calls ``optimizer.step()`` once while it is made; :meth:`Engine.set_state`
  afterwards sets masters, moments and step count, so nothing of it remains.
* Below stage 3 frozen weights are ordinary tensors, whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from transformers.integrations import HfDeepSpeedConfig

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.optim import STATE_KEYS, SparseAdamW
from gem_ds.distributed.zero_config import zero_stage
from gem_ds.sparse.layers import Gate


def partitioned_loading(config: dict[str, Any]) -> AbstractContextManager[Any]:
    """While the block lasts, ``from_pretrained`` loads weights straight into ZeRO-3 partitions.

    Below stage 3 it does nothing.
    """
    if zero_stage(config) < 3:
        return nullcontext()
    return nullcontext(HfDeepSpeedConfig(config))  # transformers keeps a weak reference to it


def whole_weights(model: nn.Module, names: Collection[str]) -> AbstractContextManager[None]:
    """While the block lasts, the named weights of a partitioned model are whole on every rank.

    What the block writes into them, alike on all ranks, is kept. Names that the model does not
    have are passed over. All ranks call this together.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named = [parameters[name] for name in names if name in parameters]
    return deepspeed.zero.GatheredParameters(named, modifier_rank=0)


def prepare_inference(model: nn.Module, config: dict[str, Any]) -> None:
    """Let a partitioned model gather each weight where a forward pass needs it, and free it again.

    Args:
        model: as loaded within :func:`partitioned_loading`; is put into eval mode.
        config: the same configuration, which names no optimizer.
    """
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()


def numel(parameter: nn.Parameter) -> int:
    """Entries of a whole parameter, partitioned or not."""
    return getattr(parameter, "ds_numel", parameter.numel())


def num_parameters(model: nn.Module) -> int:
    """N: entries of the model, each stored parameter once (tied weights once)."""
    return sum(numel(parameter) for parameter in model.parameters())


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
        self._engine, *_ = deepspeed.initialize(
            model=model, model_parameters=self._trained, optimizer=optimizer, config=config
        )
        self.model: nn.Module = self._engine.module
        self.stage: int = self._engine.zero_optimization_stage()
        self.device = torch.device(get_accelerator().current_device_name())
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
        return self._engine.was_step_applied()

    @property
    def grad_norm(self) -> Tensor | float | None:
        """The gradient's L2 norm before clipping in the last step, where the stage computes it.

        Whoever turns it into a number waits for the device.
        """
        return self._engine.get_global_grad_norm()

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

    # Weights

    def shard_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """[start, stop) of the flat range of a weight that this rank scores.

        The ZeRO-3 partition; below stage 3 the range of the same size. May be empty.
        """
        total = numel(parameter)
        size = self.partition_size(parameter)
        return min(self.comm.rank * size, total), min((self.comm.rank + 1) * size, total)

    def partition_size(self, parameter: nn.Parameter) -> int:
        """Length of every rank's range of a weight, padding included."""
        if self.stage == 3:
            return parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        return -(-numel(parameter) // self.comm.world_size)

    def read_shard(self, parameter: nn.Parameter) -> Tensor:
        """This rank's range of a weight, 1-D, in the model's dtype; not to be written.

        It stays where it lies: on the CPU if parameters are offloaded.
        """
        start, stop = self.shard_range(parameter)
        if self.stage == 3:
            return parameter.ds_tensor.data.view(-1)[: stop - start]  # type: ignore[attr-defined]
        return parameter.data.view(-1)[start:stop]

    def read_whole(self, parameter: nn.Parameter) -> Tensor:
        """A weight in its shape and the model's dtype, on every rank; not to be written."""
        if self.stage < 3:
            return parameter.data
        # Not by GatheredParameters: a forward pass may have left a gathering of it in flight.
        shard = parameter.ds_tensor.data.view(-1).to(self.device)  # type: ignore[attr-defined]
        whole = self.comm.gather_shards(shard)[: numel(parameter)]
        return whole.view(parameter.ds_shape)  # type: ignore[attr-defined]


class Engine(BaseEngine):
    """An engine of a frozen model, for calibration and for training flat vectors.

    Args:
        model: frozen, with the gates as submodules (:class:`gem_ds.sparse.layers.TargetLayers`).
        gates: holders of the trainable parameters; the first is that of the selected entries.
        optimizer: makes the client optimizer of those parameters, given in the order of the gates,
            each in a parameter group of its own.
        config: a resolved DeepSpeed configuration (:func:`distributed.zero_config.resolve_config`).
        comm: the ranks.
    """

    optimizer: SparseAdamW

    def __init__(
        self,
        model: nn.Module,
        gates: Sequence[Gate],
        optimizer: Callable[[list[nn.Parameter]], SparseAdamW],
        config: dict[str, Any],
        comm: Comm,
    ) -> None:
        self.gates = list(gates)
        super().__init__(model, optimizer([gate.values for gate in gates]), config, comm)

    @property
    def gate(self) -> Gate:
        """That of the selected entries."""
        return self.gates[0]

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
        for gate in self.gates:
            gate.open = deliver
        if deliver:
            loss = compute_loss(self._engine)
            self._engine.backward(loss)
        else:  # the engine does not see it: frozen weights need nothing of it but ZeRO-3's hooks
            loss = compute_loss(self.model)
            (loss * (self.loss_scale if loss_scale is None else loss_scale)).backward()
            if self.stage == 3:
                self._engine.optimizer.parameter_offload.release_backward_leftovers()
        return loss.detach()

    # Weights

    def writable_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """[start, stop) of the flat range that :meth:`write_entries` reaches on this rank."""
        return self.shard_range(parameter) if self.stage == 3 else (0, numel(parameter))

    def write_entries(
        self,
        parameter: nn.Parameter,
        flat_index: Tensor,
        values: Tensor,
        own: slice,
    ) -> None:
        """Set entries of a weight, in this rank's part and in any full copy that it keeps.

        Args:
            parameter: the weight.
            flat_index: int [k], all selected entries of the weight.
            values: [k], their new values.
            own: those of the k entries that lie in :meth:`writable_range`.
        """
        if self.stage < 3:
            parameter.data.view(-1)[flat_index] = values
            return
        shard = parameter.ds_tensor.data  # type: ignore[attr-defined]
        shard_index = (flat_index[own] - self.shard_range(parameter)[0]).to(shard.device)
        shard.view(-1)[shard_index] = values[own].to(shard.device)
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
            parameter.data.view(-1)[flat_index] = values
        self._let_gathers_wait()

    def _let_gathers_wait(self) -> None:
        """ZeRO-3 gathers on a stream of its own: it is to read a partition after it was written."""
        offload = self._engine.optimizer.parameter_offload
        stream = offload._DeepSpeedZeRoOffload__allgather_stream
        if stream is not None:  # None where the device has no streams
            stream.wait_stream(get_accelerator().current_stream())

    # The flat vectors: parameter, masters, moments

    def gather_values(self, gate: Gate | None = None) -> Tensor:
        """``values`` [K] of a gate (the first) in the model's dtype, whole, on every rank."""
        return self.read_whole((gate or self.gate).values)

    def get_state(self, gate: Gate | None = None) -> dict[str, Tensor]:
        """Masters and moments by ``optim.STATE_KEYS``: fp32 [K] on the CPU, on all ranks.

        One of them at a time is whole on the device.
        """
        fragment = self._fragment(gate or self.gate)
        state = self.optimizer.state[fragment.owner] or self.optimizer.reset_state(fragment.owner)
        return {
            key: self._gather(fragment, fragment.owner if key == "master" else state[key]).cpu()
            for key in STATE_KEYS
        }

    @property
    def num_updates(self) -> int:
        """Optimizer updates applied so far."""
        return self.optimizer.state[self._fragment(self.gate).owner].get("step", 0)

    def set_state(
        self, state: Mapping[str, Tensor], num_updates: int, gate: Gate | None = None
    ) -> None:
        """Set masters and moments from whole fp32 vectors [K], and ``values`` from the masters."""
        gate = gate or self.gate
        fragment = self._fragment(gate)
        own = slice(fragment.start, fragment.start + fragment.length)
        place = slice(fragment.offset, fragment.offset + fragment.length)
        moments = self.optimizer.reset_state(fragment.owner)
        moments["step"] = num_updates
        for key in STATE_KEYS:
            target = fragment.owner.data if key == "master" else moments[key]
            target.zero_()[place] = state[key][own].to(target.device)
        master = state["master"].to(self.device)
        values = gate.values
        if self.stage < 3:
            values.data.copy_(master)
            return
        shard = values.ds_tensor.data  # type: ignore[attr-defined]
        shard.zero_()[: fragment.length] = master[own]
        if values.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
            values.data.copy_(master)
        self._let_gathers_wait()

    def optimizer_state_bytes(self) -> int:
        """Bytes of masters and moments that this rank holds, measured on the tensors."""
        return bytes_of(self.optimizer, [self._fragment(gate).owner for gate in self.gates])

    def _gather(self, fragment: _Fragment, vector: Tensor) -> Tensor:
        part = vector.detach().view(-1)[fragment.offset : fragment.offset + fragment.length]
        part = part.to(self.device)
        if self.stage == 0:
            return part.clone()
        return torch.cat(self.comm.all_gather(part))

    def _fragment(self, gate: Gate) -> _Fragment:
        """Where the masters of ``values`` are kept; the one place that reads DeepSpeed's layout.

        Every gate's parameter is a parameter group of its own.
        """
        optimizer, values, group = self._engine.optimizer, gate.values, self.gates.index(gate)
        if self.stage == 3:
            owner = optimizer.fp32_partitioned_groups_flat[group]
            start, stop = self.shard_range(values)
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


def bytes_of(optimizer: Optimizer, masters: Sequence[Tensor]) -> int:
    """Bytes of masters and of what the optimizer keeps for them, measured on the tensors."""
    tensors = list(masters)
    for master in masters:
        tensors += [t for t in optimizer.state[master].values() if torch.is_tensor(t)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
