"""Frozen norms: what they keep for their backward pass gives their output again.

A target layer needs its input for the gradient of its weight. Where that is a norm's output, as of
query, key and value projections, the layer saves what the norm saves anyway, the same tensors, and
the backward pass computes the output from these: to the bit, and once for all layers that read it.

Llama's norm of 16 bits, which most decoders have, keeps its input as it came, where autograd keeps
a copy in fp32. With x in fp32, H features, g the gradient of the norm's output times the weight:

    s  = (mean(x^2) + eps)^(-1/2)          y = weight * (x s)
    dx = g s - x s^3 mean(g x)             means over the H features of a token
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Recompute:
    """Computes a norm's output from what it has kept, once for all layers that read it."""

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self._compute = compute
        self._output: Tensor | None = None
        self.num_readers = 0  # whose backward is to come

    def __call__(self, *kept: Any) -> Tensor:
        """The output, for the backward of one reader; it lives until the last one's."""
        output = self._compute(*kept) if self._output is None else self._output
        self.num_readers -= 1
        self._output = output if self.num_readers > 0 else None
        return output


class Origin(NamedTuple):
    """Where a norm's output comes from."""

    recompute: Recompute
    kept: tuple[Tensor | None, ...]  # what it takes, which the norm keeps
    version: int  # of the output, which something may have changed in place since


def origin_of(x: Tensor) -> Origin | None:
    """That of a norm's output as it was returned; a compiler decides for itself what to keep."""
    if torch.compiler.is_compiling():
        return None
    origin: Origin | None = getattr(x, "gem_ds_origin", None)
    return origin if origin is not None and origin.version == x._version else None


def norm_forward_of(module: nn.Module) -> Callable[..., Tensor] | None:
    """For a norm that is known here, a forward (of module and input) that computes the same."""
    if type(module).forward is nn.LayerNorm.forward:
        return _layer_norm
    return _llama_norm if _is_llama_norm_of_16_bits(module) else None


def _with_origin(y: Tensor, compute: Callable[..., Tensor], *kept: Tensor | None) -> Tensor:
    """The output with its origin, if the norm, whose input comes first, has a backward to come."""
    x = kept[0]
    assert x is not None
    if x.requires_grad and y.requires_grad and not torch.compiler.is_compiling():
        y.gem_ds_origin = Origin(Recompute(compute), kept, y._version)  # type: ignore[attr-defined]
    return y


def _layer_norm(module: Any, input: Tensor) -> Tensor:
    """What torch's norm computes; of its input it keeps no copy either."""

    def compute(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, shape, weight, bias, eps)

    shape, eps = module.normalized_shape, module.eps
    parameters = module.weight, module.bias
    return _with_origin(compute(input, *parameters), compute, input, *parameters)


def _llama_norm(module: Any, hidden_states: Tensor) -> Tensor:
    """What Llama's norm computes."""
    weight = module.weight
    y, scale = _LlamaNorm.apply(hidden_states, weight, module.variance_epsilon)
    return _with_origin(y, _scaled, hidden_states, weight, scale)


def _scaled(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``weight * (x scale)``, as the norm rounds it, in two launches."""
    return weight * torch.mul(x, scale, out=torch.empty_like(x))


class _LlamaNorm(torch.autograd.Function):
    """Llama's norm, which saves its input in 16 bits; returns the scale s too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        whole = x.float()
        scale = torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)  # of the scale's there is none
        return weight * (whole * scale).to(x.dtype), scale

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        g, whole = (dy * weight).float(), x.float()
        mean = (g * whole).mean(-1, keepdim=True)
        return (g * scale - whole * (mean * scale.pow(3))).to(x.dtype), None, None


def _is_llama_norm_of_16_bits(module: nn.Module) -> bool:
    """Whether a module's forward is, word for word, that of Llama's norm."""
    if not type(module).__name__.endswith("RMSNorm"):
        return False
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    is_same = _words(type(module).forward) == _words(LlamaRMSNorm.forward)
    return is_same and module.get_parameter("weight").element_size() == 2


def _words(function: Any) -> tuple[Any, ...]:
    code = function.__code__
    return code.co_code, code.co_names, code.co_consts
