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

Each process runs the module as a whole whatever its tokens, so no rank waits for another's experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gem_ds.sparse.sddmm import grouped_linear

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
        ctx.save_for_backward(weight, ends, None if layer is None else x)
        ctx.transposed, ctx.layer = transposed, layer
        return grouped_linear(x, weight if transposed else weight.transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        weight, ends, x = ctx.saved_tensors
        layer = ctx.layer
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grouped_linear(dy, weight.transpose(1, 2) if ctx.transposed else weight, ends)
        if layer is not None:
            layer.give(*((x, dy) if ctx.transposed else (dy, x)), ends)
        return dx, None, None, None, None, None


class ExpertsForward:
    """What a module of experts computes while some of its projections are targets."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.layers: dict[str, Any] = {}  # the targets by the names of the module's parameters

    @classmethod
    def of(cls, module: nn.Module) -> ExpertsForward:
        """The one that stands in the module, put there if there is none."""
        found = vars(module).get("forward")
        if not isinstance(found, cls):
            found = module.forward = cls(module)
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
        weight = getattr(self.module, name)
        layer = self.layers.get(name)
        anchor = None if layer is None else layer.anchor
        transposed = self.module.is_transposed
        y: Tensor = _GroupedLinear.apply(
            x.to(weight.dtype), weight, ends, transposed, layer, anchor
        )
        return y + getattr(self.module, f"{name}_bias")[expert] if self.module.has_bias else y
