"""A frozen weight of a layer, in which an adapter's values stand while a product runs.

The weight's own are put back behind it, so that outside of a product the model is its base to the
bit: adapters come and go, checkpoints and references (a disabled adapter) see the base, and what
shards or offloads the weight sees it unchanged. One that is quantized stays as it is: the values
stand in a dequantized copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gem_ds.distributed.weights import load_deepspeed, shape_of
from gem_ds.files.digests import checksum
from gem_ds.files.mask import WeightInfo
from gem_ds.sparse.kinds import kind_of
from gem_ds.sparse.layers import TargetLayer
from gem_ds.sparse.quantized import dequantized


class BaseWeight:
    """The parameter of a linear layer, or one that holds a matrix for each expert.

    Attributes:
        shape: Of the whole weight, as it is stored, dequantized where it is quantized.
        numel: The number of its entries.
        backend: peft's of a weight that is quantized, else None.
    """

    def __init__(self, module: nn.Module, name: str, backend: Any = None) -> None:
        self.module: Any = module
        self.name = name
        self.backend = backend
        if backend is None:
            kind = kind_of(module)
            assert kind is not None, "GemModel refuses other layers"
            self.kind, self.shape = kind, shape_of(module.get_parameter(name))
        else:
            linear: Any = module
            self.kind, self.shape = TargetLayer, (linear.out_features, linear.in_features)
        self.numel = math.prod(self.shape)

    @property
    def parameter(self) -> nn.Parameter:
        """As it is at hand: whole while the layer runs."""
        return self.module.get_parameter(self.name)  # type: ignore[no-any-return]

    @contextmanager
    def substituted(self, indices: Tensor, values: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight at hand with other values at the indices, for the length of the block.

        Of a quantized one it is a copy of its own, in the given dtype.
        """
        if self.backend is not None:
            matrix = dequantized(self.module, self.backend).to(dtype)
            matrix.view(-1).index_copy_(0, indices.long(), values.detach().to(dtype))
            yield matrix
            return
        weight = self.parameter
        flat = weight.data.view(-1)  # whose changes autograd does not count
        index = indices.long()
        base = flat.index_select(0, index)
        flat.index_copy_(0, index, values.detach().to(flat.dtype))
        try:
            yield weight
        finally:
            flat.index_copy_(0, index, base)

    def values(self, indices: Tensor) -> Tensor:
        """A copy of the base's values at flat indices [k], dequantized where it is quantized."""
        with whole(self.parameter):
            if self.backend is None:
                flat = self.parameter.data.reshape(-1)
            else:
                flat = dequantized(self.module, self.backend).reshape(-1)
            return flat[indices.to(flat.device).long()].clone()

    @torch.no_grad()
    def write(self, indices: Tensor, values: Tensor) -> None:
        """Set the entries at flat indices [k]; not of a quantized weight."""
        with whole(self.parameter, writes=True):
            weight = self.parameter.data
            index = indices.to(weight.device).long()
            weight.view(-1).index_copy_(0, index, values.to(weight.device, weight.dtype))

    def info(self, indices: Tensor) -> WeightInfo:
        """What tells the base's weight from another, by its values at flat indices."""
        return WeightInfo.of(self.shape, self.values(indices))

    def check(self, indices: Tensor, info: WeightInfo, base_model: str | None = None) -> None:
        """Refuse a base whose values at flat indices are not the recorded ones, in their dtype."""
        if not (indices[1:] > indices[:-1]).all() or not (indices < self.numel).all():
            raise ValueError(
                "The adapter has no entries of such a layer: it is incomplete or damaged, save or "
                "copy it again."
            )
        base = self.values(indices).to(getattr(torch, info.dtype))
        if tuple(info.shape) != self.shape or checksum(base) != info.checksum:
            raise ValueError(
                f"The entries were made for {base_model or 'another model'} in {info.dtype}, and "
                "this model has other weights there: load that one as the base."
            )


@contextmanager
def whole(weight: nn.Parameter, *, writes: bool = False) -> Iterator[None]:
    """While a block reads a weight, or writes it on all ranks alike, gather it from ZeRO-3.

    Raises:
        ValueError: FSDP has sharded it, which gathers nothing but for a layer that runs.
    """
    if hasattr(weight, "device_mesh"):
        raise ValueError(
            "The weights are sharded: add, load or merge an adapter before fully_shard or "
            "accelerate's prepare."
        )
    if not hasattr(weight, "ds_id"):
        yield
        return
    with load_deepspeed().zero.GatheredParameters([weight], modifier_rank=0 if writes else None):
        yield
