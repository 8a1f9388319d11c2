"""The kinds of target layer beside plain linear ones, and which kind a module can be.

A new kind is one class here, and a line of :data:`KINDS`. Its weight is one parameter, read and
written by flat index whatever its kind (:class:`gem_ds.distributed.weights.Weights`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from gem_ds.sparse.experts import ExpertsForward, project, projections_of
from gem_ds.sparse.layers import AnchoredLinear, TargetLayer
from gem_ds.sparse.quantized import computed_in, dequantized, is_quantized


class Conv1DLayer(TargetLayer):
    """transformers' Conv1D, a linear layer that stores its weight as [in, out]."""

    input_dim = 0
    is_transposed = True


class ExpertsLayer(TargetLayer):
    """A projection of all experts of a block, [experts, rows, columns]; the module may have two."""

    input_dim = None

    def attach(self) -> None:
        """Let the module compute by groups of tokens, this projection as a target."""
        ExpertsForward.of(self.module).products[self.parameter_name] = self.product

    def product(self, x: Tensor, ends: Tensor) -> Tensor:
        """That of tokens sorted by expert, [tokens, in], which end at ``ends``, [experts]."""
        weight = getattr(self.module, self.parameter_name)
        return project(x, weight, ends, self.module.is_transposed, self)


class TransposedExpertsLayer(ExpertsLayer):
    """The same where a matrix is stored as [in, out]: of gpt-oss."""

    is_transposed = True


class QuantizedLayer(TargetLayer):
    """bitsandbytes' linear layers of 4 and 8 bits: the product with the dequantized weight."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.dtype = dequantized(module).dtype

    def forward(self, x: Tensor) -> Tensor:
        """What the module computes, in the dtype in which it does."""
        return computed_in(self._compute_dtype(), self._product, x, self.module.bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, self.matrix(self.weight), bias)
        y: Tensor = AnchoredLinear.apply(x, self.weight, bias, self.anchor, self)
        return y

    def _compute_dtype(self) -> torch.dtype:
        return getattr(self.module, "compute_dtype", None) or self.dtype

    def numbers(self) -> Tensor:
        """The dequantized weight's entries, flat."""
        return dequantized(self.module).reshape(-1)

    def matrix(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        """The dequantized weight, [out, in], in the dtype in which the layer computes."""
        return dequantized(self.module).to(self._compute_dtype())


#: The forward of a module -> its kind. A subclass that computes something else is none.
KINDS: dict[Callable[..., Any], type[TargetLayer]] = {
    nn.Linear.forward: TargetLayer,
    Conv1D.forward: Conv1DLayer,
}


def kind_of(module: nn.Module) -> type[TargetLayer] | None:
    """What kind of target a module can be, if any."""
    if type(module).__name__ == "FalconLinear":  # the same product as nn.Linear's, written out
        return TargetLayer
    if is_quantized(module):
        return QuantizedLayer
    if projections_of(module):
        return TransposedExpertsLayer if module.is_transposed else ExpertsLayer
    return KINDS.get(type(module).forward)
