"""Decoupled AdamW over the selected values (Loshchilov and Hutter, arXiv 1711.05101).

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    w = w (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

It sees one flat vector of masters, whole or this rank's part, and holds two moments for each of its
entries: nothing of the size of the model exists. DeepSpeed calls it on partitions that it makes
itself, so all state hangs on the parameter and none on this object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

#: The fp32 vectors, one number per selected entry, that make up the state of a run.
STATE_KEYS = ("master", "exp_avg", "exp_avg_sq")

Piece = tuple[slice, float, int | None]
"""What of a parameter is updated, what its rate is multiplied by, and the number of this update.

That is None where no update has left the piece out: the parameter's own."""

_WHOLE: Sequence[Piece] = ((slice(None), 1.0, None),)


class SparseAdamW(torch.optim.Optimizer):
    """AdamW whose parameters are the selected entries of a model, as flat fp32 vectors.

    ``weight_decay`` pulls the selected weights themselves towards zero.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def reset_state(self, param: Tensor) -> dict[str, Any]:
        """Make or clear the state of ``param``: zero moments, no steps taken. Returns it.

        What ``pieces`` it has stay: all of ``param`` that is updated.
        """
        state: dict[str, Any] = self.state[param]
        state["step"] = 0
        for key in STATE_KEYS[1:]:
            if key in state:
                state[key].zero_()
            else:
                state[key] = torch.zeros_like(param, requires_grad=False)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "a DeepSpeed engine never passes a closure"
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param] or self.reset_state(param)
                state["step"] += 1
                for place, factor, number in state.get("pieces", _WHOLE):
                    t = state["step"] if number is None else number
                    w, g, lr = param[place], param.grad[place], group["lr"] * factor
                    m, v = state["exp_avg"][place], state["exp_avg_sq"][place]
                    m.lerp_(g, 1 - beta1)
                    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                    denominator = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
                    w.mul_(1 - lr * group["weight_decay"])
                    w.addcdiv_(m, denominator, value=-lr / (1 - beta1**t))
