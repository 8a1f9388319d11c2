"""Decoupled AdamW over the selected values (Loshchilov and Hutter, arXiv 1711.05101).

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    w = w (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

It sees one flat vector of masters, whole or this rank's part, and holds two moments for each of its
entries: nothing of the size of the model exists. DeepSpeed calls it on partitions that it makes
itself, so all state hangs on the parameter and none on this object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

#: The fp32 vectors, one number per selected entry, that make up the state of a run.
STATE_KEYS = ("master", "exp_avg", "exp_avg_sq")

_WHOLE = ((slice(None), 1.0),)


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

        What ``rate_factors`` it has stays: slices of ``param``, and what their rate is multiplied
        by.
        """
        state: dict[str, Any] = self.state[param]
        state["step"] = 0
        for key in STATE_KEYS[1:]:
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
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(param.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
                denominator = (v / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                for place, factor in state.get("rate_factors", _WHOLE):
                    w, lr = param[place], group["lr"] * factor
                    w.mul_(1 - lr * group["weight_decay"])
                    step_size = lr / (1 - beta1 ** state["step"])
                    w.addcdiv_(m[place], denominator[place], value=-step_size)
