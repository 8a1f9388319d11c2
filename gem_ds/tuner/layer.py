"""A linear layer of which an adapter's entries are trained: their values are leaves of their own.

The values (:mod:`gem_ds.tuner.entries`) stand in the weight itself while a product runs, forward or
backward, and the weight's own are put back behind it, so that outside of a product the model is its
base to the bit: adapters come and go, checkpoints and references (a disabled adapter) see the base,
and what shards or offloads the weight sees it unchanged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from gem_ds.distributed.weights import load_deepspeed, shape_of
from gem_ds.files.digests import checksum
from gem_ds.files.mask import WeightInfo
from gem_ds.sparse.layers import TargetLayer, kind_of
from gem_ds.sparse.quantized import computed_in, dequantized
from gem_ds.tuner.entries import GemEntries


class GemLayer(nn.Module, BaseTunerLayer):
    """A linear layer, in the place of which it stands, with any number of adapters' entries."""

    adapter_layer_names = ("gem_entries",)

    def __init__(self, base_layer: nn.Module, get_apply_tensor_subclass: Any = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.gem_entries: Any = nn.ModuleDict()  # adapter to GemEntries
        self.quantization_backend = resolve_quantization_backend(
            base_layer, get_apply_tensor_subclass=get_apply_tensor_subclass
        )
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._replaced: dict[str, Tensor] = {}  # of merged adapters, the base's values
        if self.quantization_backend is None:
            kind = kind_of(base_layer)
            assert kind is not None, "GemModel refuses other layers"
            rows, columns = shape_of(base_layer.get_parameter("weight"))
        else:
            kind, (rows, columns) = TargetLayer, (base_layer.out_features, base_layer.in_features)  # type: ignore[assignment]
        self.kind, self.shape, self.numel = kind, (rows, columns), rows * columns

    def get_base_weight(self) -> Tensor:
        """The weight itself, or what stands for it of a quantized one."""
        if self.quantization_backend is not None:
            return dequantized(self.get_base_layer(), self.quantization_backend)
        return self._weight().data

    def update_layer(
        self, adapter_name: str, num_entries: int, dtype: torch.dtype, base: WeightInfo | None
    ) -> None:
        """Add an adapter; ``base`` is what a saved one tells of the weight that it was made for."""
        self.gem_entries[adapter_name] = GemEntries(self, num_entries, dtype, base)

    @contextmanager
    def substituted(self, indices: Tensor, values: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight at hand with other values at the indices, for the length of the block.

        Of a quantized one it is a copy of its own, in the given dtype.
        """
        if self.quantization_backend is not None:
            matrix = self.get_base_weight().to(dtype)
            matrix.view(-1).index_copy_(0, indices.long(), values.detach().to(dtype))
            yield matrix
            return
        weight = self._weight()
        flat = weight.data.view(-1)  # whose changes autograd does not count
        index = indices.long()
        base = flat.index_select(0, index)
        flat.index_copy_(0, index, values.detach().to(flat.dtype))
        try:
            yield weight
        finally:
            flat.index_copy_(0, index, base)

    def base_values(self, indices: Tensor) -> Tensor:
        """A copy of the base's values at flat indices [k], dequantized where it is quantized."""
        with whole(self._weight()):
            flat = self.get_base_weight().reshape(-1)
            return flat[indices.to(flat.device).long()].clone()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer computes, with the active adapter's values."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.gem_entries]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if len(active) > 1:
            raise ValueError(
                f"The adapters {' and '.join(active)} give the same weights values of their own: "
                "activate one of them."
            )
        entries, base = self.gem_entries[active[0]], self.base_layer

        def forward(x: Tensor) -> Tensor:
            if self.quantization_backend is None:
                return entries(x, base.bias)  # type: ignore[no-any-return]
            dtype = getattr(base, "compute_dtype", None) or x.dtype
            return computed_in(dtype, entries, x, base.bias)

        if not _has_hooks(base):
            return forward(x)
        # What gathers or moves the weight hangs on the layer's call, so it is called.
        name = "_old_forward" if hasattr(base, "_hf_hook") else "forward"
        before = vars(base).get(name)
        vars(base)[name] = forward
        try:
            return base(x, *args, **kwargs)  # type: ignore[no-any-return]
        finally:
            if before is None:
                del vars(base)[name]
            else:
                vars(base)[name] = before

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write an adapter's values into the weight; what they replace is kept.

        Raises:
            ValueError: Another is merged, the weight is quantized or, with `safe_merge`, a value is
                not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.gem_entries:
                continue
            if self.merged:
                raise ValueError(
                    f"The adapter {self.merged_adapters[0]} is merged: unmerge it before {name}."
                )
            if self.quantization_backend is not None:
                raise ValueError(
                    "The base is quantized, and its weights cannot hold the values: write them "
                    "into an unquantized one with gem-ds export."
                )
            entries = self.gem_entries[name]
            if safe_merge and not entries.values.isfinite().all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
            self._replaced[name] = self.base_values(entries.indices)
            self._write(entries.indices, entries.values)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Give the weight the values back that a merged adapter replaced."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self._write(self.gem_entries[name].indices, self._replaced.pop(name))

    @torch.no_grad()
    def _write(self, indices: Tensor, values: Tensor) -> None:
        with whole(self._weight(), writes=True):
            weight = self._weight().data
            index = indices.to(weight.device).long()
            weight.view(-1).index_copy_(0, index, values.to(weight.device, weight.dtype))

    def _weight(self) -> nn.Parameter:
        """The base layer's, as it is at hand; whole while the layer runs."""
        return self.get_base_layer().get_parameter("weight")

    def weight_info(self, indices: Tensor) -> WeightInfo:
        """What tells the base's weight from another, by its values at flat indices."""
        return WeightInfo.of(self.shape, self.base_values(indices))

    def check_base(self, indices: Tensor, info: WeightInfo, base_model: str | None = None) -> None:
        """Refuse a base whose values at flat indices are not the recorded ones, in their dtype."""
        if not (indices[1:] > indices[:-1]).all() or not (indices < self.numel).all():
            raise ValueError(
                "The adapter has no entries of such a layer: it is incomplete or damaged, save or "
                "copy it again."
            )
        base = self.base_values(indices).to(getattr(torch, info.dtype))
        if tuple(info.shape) != self.shape or checksum(base) != info.checksum:
            raise ValueError(
                f"The entries were made for {base_model or 'another model'} in {info.dtype}, and "
                "this model has other weights there: load that one as the base."
            )

    def __repr__(self) -> str:
        return "gem." + super().__repr__()


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return hasattr(module, "_hf_hook") or any(getattr(module, f"_{kind}_hooks") for kind in kinds)


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
