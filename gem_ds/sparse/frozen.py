"""What frozen layers keep of a forward pass for their backward pass: no more than that needs.

A linear layer keeps its weight *parameter*, of which ZeRO-3 may hold a part in between, and nothing
of its input, which only a gradient of its own would need. (DeepSpeed's own linear function keeps
the input; torch's keeps what ZeRO-3 has gathered.) Llama's norm of 16 bits, which most decoders
have, keeps its input as it came, where autograd keeps a copy in fp32. Outputs are the same to the
bit.

With x in fp32, H features, g the gradient of the norm's output times the weight:

    s  = (mean(x^2) + eps)^(-1/2)          y = weight * (x s)
    dx = g s - x s^3 mean(g x)             means over the H features of a token
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gem_ds.sparse.kinds import kind_of
from gem_ds.sparse.layers import TargetLayer


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


class _FrozenNorm(torch.autograd.Function):
    """Llama's norm, which saves its input in 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        whole = x.float()
        scale = torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (whole * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        g, whole = (dy * weight).float(), x.float()
        mean = (g * whole).mean(-1, keepdim=True)
        return (g * scale - whole * (mean * scale.pow(3))).to(x.dtype), None, None


def _linear_forward(module: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer computes while nothing of it is trained: the same as ever."""
    y: Tensor = _FrozenLinear.apply(x, module.weight, module.bias)
    return y


def _norm_forward(module: Any, hidden_states: Tensor) -> Tensor:
    """What a norm computes: the same as ever."""
    y: Tensor = _FrozenNorm.apply(hidden_states, module.weight, module.variance_epsilon)
    return y


def keep_less(model: nn.Module) -> list[nn.Module]:
    """Swap the forward of plain linear layers and of norms; returns the modules.

    The output layer keeps its own, as its loss is computed in it; and so does whatever has another
    forward than its class's already.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    swapped: list[Any] = []
    for module in model.modules():
        forward: Callable[..., Tensor] | None = None
        if kind_of(module) is TargetLayer and module is not output:
            forward = _linear_forward
        elif _is_norm_of_16_bits(module):
            forward = _norm_forward
        if forward is not None and "forward" not in vars(module):
            swapped.append(module)
            swapped[-1].forward = MethodType(forward, module)  # compilers know such of any module
    return swapped


def give_back(modules: Collection[nn.Module]) -> None:
    """Undo :func:`keep_less`."""
    for module in modules:
        vars(module).pop("forward", None)


def _is_norm_of_16_bits(module: nn.Module) -> bool:
    """Whether a module's forward is, word for word, that of Llama's norm."""
    if not type(module).__name__.endswith("RMSNorm"):
        return False
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    is_same = _words(type(module).forward) == _words(LlamaRMSNorm.forward)
    return is_same and module.get_parameter("weight").element_size() == 2


def _words(function: Any) -> tuple[Any, ...]:
    code = function.__code__
    return code.co_code, code.co_names, code.co_consts
