"""One adapter's entries of one weight, and the product in which they are trained.

Equivalent code first, for a frozen weight ``W`` and values ``v`` [k] at flat indices ``i``:

    W' = W.flatten().index_copy(0, i, v).view_as(W)
    y  = x @ W'.T + b

No W' is made: :meth:`gem_ds.tuner.weight.BaseWeight.substituted` has the values stand in W while a
product runs, forward or backward. Their gradient is the sampled product of
:mod:`gem_ds.sddmm`. All of it is an ordinary function of x and v for autograd, so clipping,
accumulation, both kinds of checkpointing and autocast are what they are for any parameter.

Of experts W is a matrix for each, and ``ends`` says where the tokens of each end
(:mod:`gem_ds.sparse.experts`, whose forward calls this product).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gem_ds.files.mask import WeightInfo, index_dtype
from gem_ds.sddmm import Pattern, add_sampled_product, grouped_linear
from gem_ds.tuner.weight import BaseWeight


class GemEntries(nn.Module):
    """One adapter's entries of one weight: ``indices``, a buffer [k], and ``values``, [k].

    A module, so that ZeRO-3 gathers the values where it runs. What stands in the two may be loaded
    by anyone; a saved adapter's ``base`` tells which base its indices are of.
    """

    def __init__(
        self, weight: BaseWeight, num_entries: int, dtype: torch.dtype, base: WeightInfo | None
    ) -> None:
        super().__init__()
        self._weight = weight
        self.base = base
        self.indices: Tensor
        device = weight.parameter.device
        indices = torch.zeros(num_entries, dtype=index_dtype(weight.numel), device=device)
        self.register_buffer("indices", indices)
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
