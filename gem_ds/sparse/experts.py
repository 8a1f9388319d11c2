"""Experts: one parameter holds a matrix for each, and a token passes through some of them.

transformers keeps a projection of all experts of a block as one parameter, [experts, out, in], or
[experts, in, out] (gpt-oss), and the module says how it combines them (its decorator
``use_experts_implementation``). While one of them is a target, the module computes by
:class:`ExpertsForward`: tokens are sorted by expert, each group is multiplied by its own matrix,
and the results are put back in order. With ``ends``, where each group of tokens ends, and e the
expert of token t:

    y_t = W_e x_t + b_e             forward
    dx_t = W_e^T dy_t               backward
    sink(dy, x, ends)               backward, instead of ``W_e.grad = sum over its t of dy_t x_t^T``

In peft's tuner, values of an adapter stand in W_e meanwhile (:mod:`gem_ds.tuner.entries`).
Each process runs the module as a whole whatever its tokens, so no rank waits for another's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gem_ds.sddmm import grouped_linear

#: What transformers calls the projections, of which a module has two.
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


def projections_of(module: nn.Module) -> list[str]:
    """The names of the parameters that hold a matrix for each expert; of other modules none."""
    if not hasattr(module, "_is_expert_parallel"):  # the decorator's mark
        return []
    names = [name for name, _ in module.named_parameters(recurse=False)]
    return [name for name in PROJECTIONS if name in names]


class _GroupedLinear(torch.autograd.Function):
    """Groups of tokens by frozen matrices; a target layer's sink is told the gradient's factors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, transposed: bool, layer: Any, _: Any
    ) -> Tensor:
        ctx.save_for_backward(weight, ends, None if layer is None else layer.kept(x))
        ctx.transposed, ctx.layer, ctx.dtype = transposed, layer, x.dtype
        return grouped_linear(x, weight if transposed else weight.transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        weight, ends, x = ctx.saved_tensors
        layer = ctx.layer
        dx = None
        if ctx.needs_input_grad[0]:
            matrix = weight.to(dy.dtype)  # under autocast the product was one in dy's dtype
            dx = grouped_linear(dy, matrix.transpose(1, 2) if ctx.transposed else matrix, ends)
            dx = dx.to(ctx.dtype)
        if layer is not None:
            layer.give(*layer.factors(dy, x.to(dy.dtype)), ends)
        return dx, None, None, None, None, None


def project(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool, layer: Any = None) -> Tensor:
    """The product of tokens sorted by expert, [tokens, in], which end at ``ends``, [experts].

    Of a weight [experts, out, in], or [experts, in, out] if it is ``transposed``; a target's
    ``layer`` is told the factors of its gradient.
    """
    anchor = None if layer is None else layer.anchor
    y: Tensor = _GroupedLinear.apply(x, weight, ends, transposed, layer, anchor)
    return y


class ExpertsForward:
    """What a module of experts computes while some of its projections are targets.

    ``products`` has theirs by the names of the module's parameters, of tokens x and ``ends`` as
    :func:`project` takes them.
    """

    def __init__(self, module: nn.Module, products: Mapping[str, Callable[..., Tensor]]) -> None:
        self.module: Any = module
        self.products = dict(products)

    @classmethod
    def of(cls, module: nn.Module) -> ExpertsForward:
        """The one that stands in the module, put there if there is none."""
        found = vars(module).get("forward")
        if not isinstance(found, cls):
            found = module.forward = cls(module, {})
        return found

    def __call__(self, hidden_states: Tensor, experts: Tensor, routing_weights: Tensor) -> Tensor:
        """The module's output [tokens, features]; of each token k experts and their weights."""
        module = self.module
        num_tokens, k = experts.shape
        expert, order = experts.reshape(-1).sort(stable=True)
        numbers = torch.arange(module.num_experts, device=expert.device)
        ends = torch.searchsorted(expert, numbers, right=True).int()
        first = "gate_up_proj" if module.has_gate else "up_proj"
        y = self._project(first, hidden_states[order // k], ends, expert)
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = self._project("down_proj", y, ends, expert)
        if module.has_post_expert_norm:
            y = module.post_expert_norm(y)
        y = y * routing_weights.reshape(-1)[order, None]
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return y[place].view(num_tokens, k, -1).sum(dim=1).to(hidden_states.dtype)

    def _project(self, name: str, x: Tensor, ends: Tensor, expert: Tensor) -> Tensor:
        module, weight = self.module, getattr(self.module, name)
        x = x.to(weight.dtype)
        if name in self.products:
            y = self.products[name](x, ends=ends)
        else:
            y = project(x, weight, ends, module.is_transposed)
        return y + getattr(module, f"{name}_bias")[expert] if module.has_bias else y
