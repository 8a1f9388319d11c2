"""A frozen weight of a layer, an adapter's entries of it, and the product that trains them.

Equivalent code first, for a frozen weight ``W`` and values ``v`` [k] at flat indices ``i``:

    W' = W.flatten().index_copy(0, i, v).view_as(W)
    y  = x @ W'.T + b

No W' is made: the values stand in W while a product runs, forward or backward
(:meth:`BaseWeight.substituted`), and W's own are put back behind it. So outside of a product the
model is its base to the bit: adapters come and go, checkpoints and references (a disabled adapter)
see the base, and what shards or offloads the weight sees it unchanged. One that is quantized stays
as it is: the values stand in a dequantized copy.

The values' gradient is the sampled product of :mod:`gem_ds.sddmm`. All of it is an ordinary
function of x and v for autograd, so clipping, accumulation, checkpointing and autocast are what
they are for any parameter. Of experts W is a matrix for each, and ``ends`` says where the
tokens of each end (:mod:`gem_ds.sparse.experts`, whose forward calls this product).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gem_ds.distributed.weights import load_deepspeed, shape_of
from gem_ds.files.digests import checksum
from gem_ds.files.mask import WeightInfo
from gem_ds.sddmm import Pattern, add_sampled_product, grouped_linear
from gem_ds.select.shards import index_dtype
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


class GemEntries(nn.Module):
    """One adapter's entries of one weight: ``indices``, a buffer [k], and ``values``, [k].

    A module, so that ZeRO-3 gathers the values where it runs. What stands in the two may be loaded
    by anyone; a saved adapter's ``base`` tells which base its indices are of.
    """

    def __init__(self, weight: BaseWeight, num_entries: int, base: WeightInfo | None) -> None:
        super().__init__()
        self._weight = weight
        self.base = base
        self.indices: Tensor
        parameter = weight.parameter
        device = parameter.device
        indices = torch.zeros(num_entries, dtype=index_dtype(weight.numel), device=device)
        self.register_buffer("indices", indices)
        # Under ZeRO-3, which takes one dtype, that of the weights.
        dtype = parameter.dtype if hasattr(parameter, "ds_id") else torch.float32
        self.values = nn.Parameter(torch.zeros(num_entries, dtype=dtype, device=device))
        self._pattern: tuple[Tensor, int, Pattern] | None = None  # of which indices

    def select(self, indices: Tensor) -> None:
        """Take entries, [k] ascending flat indices, with the base's values."""
        base = self._weight.values(indices)
        self.indices = indices.to(base.device, self.indices.dtype)
        if not self.values.is_meta:
            self.values.data = base.to(self.values.dtype)

    def pattern(self) -> Pattern:
        """The entries for the sampled product, found anew where the indices are others."""
        indices, known = self.indices, self._pattern
        if known is None or known[0] is not indices or known[1] != indices._version:
            if self.base is not None:
                self._weight.check(indices, self.base)
            known = indices, indices._version, Pattern.of(indices, self._weight.shape)
            self._pattern = known
        return known[2]

    def forward(self, x: Tensor, bias: Tensor | None = None, ends: Tensor | None = None) -> Tensor:
        """The weight's product with these values in the place of its own."""
        weight, pattern = self._weight, self.pattern()
        if torch.is_grad_enabled():
            y: Tensor = _SubstitutedProduct.apply(x, self.values, bias, ends, pattern, weight)
            return y
        with weight.substituted(self.indices, self.values, x.dtype) as stored:
            return _product(x, weight.kind.matrix(stored), bias, ends)


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None, ends: Tensor | None) -> Tensor:
    """Of a matrix [out, in], or of tokens sorted by expert with theirs, [experts, out, in]."""
    if ends is None:
        return F.linear(x, matrix, bias)
    return grouped_linear(x, matrix.transpose(1, 2), ends)


class _SubstitutedProduct(torch.autograd.Function):
    """``x @ W'.T + b``, of x, the values and the bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        ends: Tensor | None,
        pattern: Pattern,
        weight: BaseWeight,
    ) -> Tensor:
        ctx.save_for_backward(x, values, ends)
        ctx.pattern, ctx.weight = pattern, weight
        with weight.substituted(pattern.flat_index, values, x.dtype) as stored:
            return _product(x, weight.kind.matrix(stored), bias, ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, ends = ctx.saved_tensors
        weight, dx, d_values, d_bias = ctx.weight, None, None, None
        if ctx.needs_input_grad[0]:
            with weight.substituted(ctx.pattern.flat_index, values, x.dtype) as stored:
                # Under autocast the product was one in dy's dtype.
                matrix = weight.kind.matrix(stored.to(dy.dtype))
                dx = dy @ matrix if ends is None else grouped_linear(dy, matrix, ends)
                dx = dx.to(x.dtype)
        tokens = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[1]:
            factors = weight.kind.factors(tokens, x.reshape(-1, x.shape[-1]).to(dy.dtype))
            sums = torch.zeros(ctx.pattern.num_entries, dtype=torch.float32, device=dy.device)
            add_sampled_product(sums, factors[0], factors[1], ctx.pattern, ends=ends)
            d_values = sums.to(values.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = tokens.sum(dim=0)
        return dx, d_values, d_bias, None, None, None
