"""A linear layer of which an adapter's entries are trained: their values are leaves of their own.

Equivalent code first, for a frozen weight ``W`` and values ``v`` [k] at flat indices ``i``:

    W' = W.flatten().index_copy(0, i, v).view_as(W)
    y  = x @ W'.T + b

No W' is made. The values stand in W itself while a product runs, forward or backward, and W's own
are put back behind it, so that outside of a product the model is its base to the bit: adapters come
and go, checkpoints and references (a disabled adapter) see the base, and what shards or offloads W
sees it unchanged. The values' gradient is the sampled product of :mod:`gem_ds.sparse.sddmm`. All
of it is an ordinary function of x and v for autograd, so clipping, accumulation, both kinds of
checkpointing and autocast are what they are for any parameter.
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
from torch.nn import functional as F

from gem_ds.distributed.weights import load_deepspeed, shape_of
from gem_ds.files.digests import checksum
from gem_ds.files.mask import WeightInfo, index_dtype
from gem_ds.sparse.layers import TargetLayer, kind_of
from gem_ds.sparse.sddmm import Pattern, add_sampled_product


class GemEntries(nn.Module):
    """One adapter's entries of one weight: ``indices``, a buffer [k], and ``values``, [k].

    A module, so that ZeRO-3 gathers the values where it runs. What stands in the two may be loaded
    by anyone; a saved adapter's ``base`` tells which base its indices are of.
    """

    def __init__(
        self, layer: GemLayer, num_entries: int, dtype: torch.dtype, base: WeightInfo | None
    ) -> None:
        super().__init__()
        self._layer = [layer]  # in a list, so that it is no submodule
        self.base = base
        self.indices: Tensor
        indices = torch.zeros(num_entries, dtype=index_dtype(layer.numel))
        self.register_buffer("indices", indices)
        self.values = nn.Parameter(torch.zeros(num_entries, dtype=dtype))
        self._pattern: tuple[Tensor, int, Pattern] | None = None  # of which indices

    def select(self, indices: Tensor) -> None:
        """Take entries, [k] ascending flat indices, with the base's values."""
        base = self._layer[0].base_values(indices)
        self.indices = indices.to(base.device, self.indices.dtype)
        if not self.values.is_meta:
            self.values.data = base.to(self.values.dtype)

    def pattern(self) -> Pattern:
        """The entries for the sampled product, found anew where the indices are others."""
        indices, known = self.indices, self._pattern
        if known is None or known[0] is not indices or known[1] != indices._version:
            if self.base is not None:
                self._layer[0].check_base(indices, self.base)
            known = indices, indices._version, Pattern.of(indices, self._layer[0].shape)
            self._pattern = known
        return known[2]

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output with these values in the place of the weight's."""
        layer, pattern = self._layer[0], self.pattern()
        if torch.is_grad_enabled():
            y: Tensor = _SubstitutedLinear.apply(x, self.values, bias, pattern, layer)
            return y
        with layer.substituted(self.indices, self.values, x.dtype) as weight:
            return F.linear(x, layer.kind.matrix(weight), bias)


class _SubstitutedLinear(torch.autograd.Function):
    """``x @ W'.T + b``, of x, the values and the bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, layer: GemLayer
    ) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.pattern, ctx.layer = pattern, layer
        with layer.substituted(pattern.flat_index, values, x.dtype) as weight:
            return F.linear(x, layer.kind.matrix(weight), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        layer, dx, d_values, d_bias = ctx.layer, None, None, None
        if ctx.needs_input_grad[0]:
            with layer.substituted(ctx.pattern.flat_index, values, x.dtype) as weight:
                # Under autocast the product was one in dy's dtype.
                dx = (dy @ layer.kind.matrix(weight.to(dy.dtype))).to(x.dtype)
        tokens = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[1]:
            factors = layer.kind.factors(tokens, x.reshape(-1, x.shape[-1]).to(dy.dtype))
            sums = torch.zeros(ctx.pattern.num_entries, dtype=torch.float32, device=dy.device)
            add_sampled_product(sums, factors[0], factors[1], ctx.pattern)
            d_values = sums.to(values.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = tokens.sum(dim=0)
        return dx, d_values, d_bias, None, None


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
        """As peft's, which cannot read what bitsandbytes has laid out for its kernel on CPUs."""
        layer: Any = self.get_base_layer()
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()  # lays it back
        return super().get_base_weight()

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
            whole = self.get_base_weight().to(dtype)
            whole.view(-1).index_copy_(0, indices.long(), values.detach().to(dtype))
            yield whole
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
        with _whole(self._weight()):
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
            bias = None if base.bias is None else base.bias.to(dtype)
            return entries(x.to(dtype), bias).to(x.dtype)  # type: ignore[no-any-return]

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
        """Write an adapter's values into the weight; what they replace is kept."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.gem_entries:
                continue
            if self.merged:
                raise ValueError(
                    f"The adapter {self.merged_adapters[0]} is merged: unmerge it before {name}."
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
        with _whole(self._weight(), writes=True):
            weight = self.get_base_weight()
            index = indices.to(weight.device).long()
            weight.view(-1).index_copy_(0, index, values.to(weight.device, weight.dtype))
            self.set_base_weight(weight)

    def _weight(self) -> nn.Parameter:
        return self.get_base_layer().get_parameter("weight")

    def weight_info(self, indices: Tensor) -> WeightInfo:
        """What tells the base's weight from another, by its values at flat indices."""
        return WeightInfo.of(self.shape, self.base_values(indices))

    def check_base(self, indices: Tensor, info: WeightInfo, base_model: str | None = None) -> None:
        """Refuse a base whose values at flat indices are not the recorded ones, in their dtype."""
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
def _whole(weight: nn.Parameter, *, writes: bool = False) -> Iterator[None]:
    """While a block reads a weight, or writes it on all ranks alike, gather it from ZeRO-3."""
    if not hasattr(weight, "ds_id"):
        yield
        return
    with load_deepspeed().zero.GatheredParameters([weight], modifier_rank=0 if writes else None):
        yield
