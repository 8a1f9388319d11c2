"""What frozen layers keep of a forward pass for their backward pass: no more than that needs.

A linear layer keeps its weight *parameter*, of which ZeRO-3 may hold a part in between, and nothing
of its input, which only a gradient of its own would need. (DeepSpeed's own linear function keeps
the input; torch's keeps what ZeRO-3 has gathered.) Norms are :mod:`gem_ds.sparse.norms`' subject.
Outputs are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Collection
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gem_ds.sparse.kinds import kind_of
from gem_ds.sparse.layers import TargetLayer
from gem_ds.sparse.norms import BLOCK, norm_forward_of


class _FrozenLinear(torch.autograd.Function):
    """A linear layer's function that saves its weight alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return dy @ weight.to(dy.dtype), None, None


def _linear_forward(module: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer computes while nothing of it is trained: the same as ever."""
    y: Tensor = _FrozenLinear.apply(x, module.weight, module.bias)
    return y


def keep_less(model: nn.Module) -> list[nn.Module]:
    """Swap the forward of plain linear layers and of norms; returns the modules.

    The output layer keeps its own, as its loss is computed in it; and so does whatever has another
    forward than its class's already.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    can_run_again = (m for m in model.modules() if hasattr(m, "gradient_checkpointing"))
    blocks = {inner: block for block in can_run_again for inner in block.modules()}  # innermost
    swapped: list[Any] = []
    for module in model.modules():
        is_linear = kind_of(module) is TargetLayer and module is not output
        forward = _linear_forward if is_linear else norm_forward_of(module)
        if forward is not None and "forward" not in vars(module):
            swapped.append(module)
            swapped[-1].forward = MethodType(forward, module)  # compilers know such of any module
            vars(module)[BLOCK] = blocks.get(module)
    return swapped


def give_back(modules: Collection[nn.Module]) -> None:
    """Undo :func:`keep_less`."""
    for module in modules:
        vars(module).pop("forward", None)
        vars(module).pop(BLOCK, None)
