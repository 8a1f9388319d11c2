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

#: A norm's attribute: the block it is in, one of those that transformers can run again.
BLOCK = "gem_ds_block"


class Recompute:
    """Computes a norm's output from what the norm has kept, once for all layers that read it."""

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self._compute = compute
        self._output: Tensor | None = None

    def __call__(self, *kept: Any) -> Tensor:
        """The output, for the backward of a layer that has read it."""
        if self._output is None:
            self._output = self._compute(*kept)
        return self._output

    def forget(self, *_: Any) -> None:
        """Drop the output: the norm's own backward comes, and with it all readers' have been."""
        self._output = None


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


def _layer_norm(module: Any, input: Tensor) -> Tensor:
    """What torch's norm computes; of its input it keeps no copy either."""
    shape, eps = module.normalized_shape, module.eps

    def compute(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, shape, weight, bias, eps)

    y = compute(input, module.weight, module.bias)
    return _with_origin(y, module, compute, input, module.weight, module.bias)


def _llama_norm(module: Any, hidden_states: Tensor) -> Tensor:
    """What Llama's norm computes."""
    with torch.no_grad():
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        scale = torch.rsqrt(variance + module.variance_epsilon)
    y = _LlamaNorm.apply(hidden_states, module.weight, scale)
    return _with_origin(y, module, _scaled, hidden_states, module.weight, scale)


def _with_origin(
    y: Tensor, module: nn.Module, compute: Callable[..., Tensor], x: Tensor, *more: Tensor | None
) -> Tensor:
    """The output y of the input x, with its origin if the norm keeps x for a backward to come.

    Not in a block that is run again in the backward pass, which keeps nothing until then. Where the
    two differ in dtype, autocast had a hand in it, which the backward pass is without.
    """
    if torch.compiler.is_compiling() or not (x.requires_grad and y.requires_grad):
        return y
    block = vars(module).get(BLOCK)
    is_run_again = block is not None and block.gradient_checkpointing and block.training
    if not is_run_again and x.dtype == y.dtype:
        recompute = Recompute(compute)
        y.grad_fn.register_prehook(recompute.forget)  # type: ignore[union-attr]
        y.gem_ds_origin = Origin(recompute, (x, *more), y._version)  # type: ignore[attr-defined]
    return y


def _scaled(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``weight * (x scale)``, as the norm rounds it, in two launches."""
    return weight * torch.mul(x, scale, out=torch.empty_like(x))


class _LlamaNorm(torch.autograd.Function):
    """Llama's norm of the scale s, which saves its input in 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        return weight * (x * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
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
