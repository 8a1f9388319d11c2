"""The weights of a model whatever ZeRO makes of them: ranges, reading, writing.

Facts of DeepSpeed 0.19 that this file rests on, each held by ``tests/distributed/test_engine.py``:

* ZeRO-3 cuts a weight of n entries into ranges of ``ceil(n / world_size)``; the padding of the last
  one is uninitialised memory.
* Parameters below the persistence threshold keep a full copy in ``param.data`` between steps, and a
  forward pass in train mode without gradients can leave copies of any: writing updates them too.
* ZeRO-3 gathers weights on a stream of its own, which does not wait for what others have written.
* Below stage 3 frozen weights are ordinary tensors, whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.zero_config import zero_stage


def load_deepspeed() -> Any:
    """The library, imported where it is first needed."""
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError("This needs DeepSpeed: pip install deepspeed.") from error
    return deepspeed


def partitioned_loading(config: dict[str, Any]) -> AbstractContextManager[Any]:
    """While the block lasts, ``from_pretrained`` loads weights straight into ZeRO-3 partitions.

    Below stage 3 it does nothing.
    """
    if zero_stage(config) < 3:
        return nullcontext()
    load_deepspeed()
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return nullcontext(HfDeepSpeedConfig(config))  # transformers keeps a weak reference to it


def whole_weights(model: nn.Module, names: Collection[str]) -> AbstractContextManager[None]:
    """While the block lasts, the named weights of a partitioned model are whole on every rank.

    What the block writes into them, alike on all ranks, is kept. Names that the model does not
    have are passed over. All ranks call this together.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named = [parameters[name] for name in names if name in parameters]
    return load_deepspeed().zero.GatheredParameters(  # type: ignore[no-any-return]
        named, modifier_rank=0
    )


def skip_gather_in_backward(module: Any) -> None:
    """Say of a module that has just run that its backward pass will read none of its weights.

    ZeRO-3 then gathers none for it. DeepSpeed counts the backward passes that are to come.
    """
    module.applied_pre_backward_ref_cnt = 0


def numel(parameter: Tensor) -> int:
    """Entries of a whole parameter, partitioned or not."""
    return prod(shape_of(parameter))


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a whole parameter: partitioned, or packed in 4 bits by bitsandbytes, or not."""
    packed = getattr(parameter, "quant_state", None)
    return tuple(packed.shape if packed else getattr(parameter, "ds_shape", parameter.shape))


def num_parameters(model: nn.Module) -> int:
    """N: entries of the model, each stored parameter once (tied weights once)."""
    return sum(numel(parameter) for parameter in model.parameters())


@dataclass(frozen=True)
class Entries:
    """Some entries of a weight, and which of them this rank writes: at ZeRO-3 its partition's."""

    parameter: nn.Parameter
    flat_index: Tensor  # int [k], ascending
    own: slice  # of the k, those that this rank writes
    #: Where these are in its part of the weight: int64, on that part's device; None: all of it.
    shard_index: Tensor | None


class Weights:
    """A rank's view of the model's weights; calls ``let_gathers_wait`` when it has written."""

    def __init__(
        self, comm: Comm, stage: int = 0, let_gathers_wait: Callable[[], None] = lambda: None
    ) -> None:
        self.comm, self.stage, self._let_gathers_wait = comm, stage, let_gathers_wait

    def shard_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """[start, stop) of the flat range of a weight that this rank scores.

        The ZeRO-3 partition; below stage 3 the range of the same size. May be empty.
        """
        total = numel(parameter)
        size = self.partition_size(parameter)
        return min(self.comm.rank * size, total), min((self.comm.rank + 1) * size, total)

    def partition_size(self, parameter: nn.Parameter) -> int:
        """Length of every rank's range of a weight, padding included."""
        return -(-numel(parameter) // self.comm.world_size)

    def read_shard(self, parameter: nn.Parameter) -> Tensor:
        """This rank's range of a weight, 1-D, in the model's dtype; not to be written.

        It stays where it lies: on the CPU if parameters are offloaded.
        """
        start, stop = self.shard_range(parameter)
        if self.stage == 3:
            return _partition(parameter).view(-1)[: stop - start]
        return parameter.data.view(-1)[start:stop]

    def read_entries(self, entries: Sequence[tuple[nn.Parameter, Tensor]]) -> list[Tensor]:
        """Values at ascending flat indices [k] of some parameters, on every rank, to the bit.

        Each rank contributes the bytes of its own ranges; the others' are zero, so a sum over the
        ranks keeps every bit, the sign of zero included. One collective for all parameters.
        """
        found = []
        for parameter, index in entries:
            shard, bounds = self.read_shard(parameter), self.shard_range(parameter)
            own = within(index, bounds)
            values = shard.new_zeros(index.numel(), device=self.comm.device)
            values[own] = shard[(index[own] - bounds[0]).to(shard.device)].to(values.device)
            found.append(values)
        summed = self.comm.all_reduce(torch.cat([v.view(torch.uint8) for v in found]), "sum")
        parts = summed.split([values.nbytes for values in found])
        # A clone, as a part may begin anywhere and numbers of two and four bytes may not.
        return [p.clone().view(v.dtype) for p, v in zip(parts, found, strict=True)]

    def read_whole(self, parameter: nn.Parameter) -> Tensor:
        """A weight in its shape and the model's dtype, on every rank; not to be written."""
        if self.stage < 3:
            return parameter.data
        # Not by GatheredParameters: a forward pass may have left a gathering of it in flight.
        shard = _partition(parameter).view(-1).to(self.comm.device)
        return self.comm.gather_shards(shard)[: numel(parameter)].view(shape_of(parameter))

    def entries(self, parameter: nn.Parameter, flat_index: Tensor) -> Entries:
        """Entries of a weight at ascending flat indices [k], to be written again and again."""
        bounds = self.shard_range(parameter) if self.stage == 3 else (0, numel(parameter))
        own = within(flat_index, bounds)
        if own.stop - own.start == bounds[1] - bounds[0]:
            return Entries(parameter, flat_index, own, None)
        shard_index = flat_index[own].long() - bounds[0]
        return Entries(parameter, flat_index, own, shard_index.to(self._writable(parameter).device))

    def write_entries(self, entries: Sequence[Entries], values: Tensor) -> None:
        """Set entries to ``values`` [K], one weight's after another's, on every rank the same.

        In this rank's parts, and in any full copies that it keeps. Values cross to parts that are
        offloaded together; then each weight is one launch, and ZeRO-3's gathers wait once.
        """
        parts = values.split([part.flat_index.numel() for part in entries])
        own = [part[place.own] for place, part in zip(entries, parts, strict=True)]
        device = self._writable(entries[0].parameter).device
        if device != values.device:
            own = list(torch.cat(own).to(device).split([part.numel() for part in own]))
        for place, mine, whole in zip(entries, own, parts, strict=True):
            written = self._writable(place.parameter)
            if place.shard_index is None:
                written[: mine.numel()] = mine
            else:
                written.index_copy_(0, place.shard_index, mine)
            if self.stage == 3 and _is_gathered(place.parameter):
                place.parameter.data.view(-1)[place.flat_index] = whole
        if self.stage == 3:
            self._let_gathers_wait()

    def _writable(self, parameter: nn.Parameter) -> Tensor:
        """The part of a weight that this rank writes, flat; at stage 3 its end may be padding."""
        return (_partition(parameter) if self.stage == 3 else parameter.data).view(-1)

    def write_whole(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Set all entries of a flat parameter; the padding of this rank's part becomes zero."""
        if self.stage < 3:
            parameter.data.copy_(values)
            return
        start, stop = self.shard_range(parameter)
        _partition(parameter).zero_()[: stop - start] = values[start:stop]
        if _is_gathered(parameter):
            parameter.data.copy_(values)
        self._let_gathers_wait()


def within(index: Tensor, bounds: tuple[int, int]) -> slice:
    """The positions of an ascending ``index`` whose values lie in [start, stop)."""
    low, high = torch.searchsorted(index, torch.tensor(bounds, device=index.device)).tolist()
    return slice(low, high)


def _partition(parameter: Any) -> Tensor:
    part: Tensor = parameter.ds_tensor.data
    return part


def _is_gathered(parameter: Any) -> bool:
    """Whether a partitioned parameter has a full copy in ``data`` at the moment."""
    return bool(parameter.ds_status.name == "AVAILABLE")
