"""One adapter's entries of one layer, and the product in which they are trained.

Equivalent code first, for a frozen weight ``W`` and values ``v`` [k] at flat indices ``i``:

    W' = W.flatten().index_copy(0, i, v).view_as(W)
    y  = x @ W'.T + b

No W' is made: :meth:`gem_ds.tuner.layer.GemLayer.substituted` has the values stand in W while a
product runs, forward or backward. Their gradient is the sampled product of
:mod:`gem_ds.sparse.sddmm`. All of it is an ordinary function of x and v for autograd, so clipping,
accumulation, both kinds of checkpointing and autocast are what they are for any parameter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gem_ds.files.mask import WeightInfo, index_dtype
from gem_ds.sparse.sddmm import Pattern, add_sampled_product

if TYPE_CHECKING:
    from gem_ds.tuner.layer import GemLayer


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
