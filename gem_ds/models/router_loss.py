"""The auxiliary loss of a mixture's routers, where the model's configuration asks for it.

A model of transformers with ``output_router_logits`` returns it beside the logits, and adds
``router_aux_loss_coef`` times it to its own loss, a mean. Here losses are sums:

    loss = summed loss of the items + items * router_aux_loss_coef * aux_loss

Divided by the items of the global batch that is transformers' loss of one micro-batch, and the mean
of several, weighted by items: how evenly tokens are routed is no sum over tokens, so this part is a
micro-batch's, as wherever such models are trained. Padding counts for nothing in it but with
``--packing``, where rows have no attention mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gem_ds.data.batches import SummedLoss

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # JetMoe's is the second


def with_router_loss(summed_loss: SummedLoss, model: nn.Module) -> SummedLoss:
    """``summed_loss`` with that of the routers of ``model``; itself where it has none to add."""
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if config is not None else None
    if not getattr(text, "output_router_logits", False):
        return summed_loss
    owners = ((owner, name) for owner in (model, text) for name in _COEFFICIENTS)
    coefficient = next((getattr(o, name) for o, name in owners if hasattr(o, name)), 0.0)
    if not coefficient:
        return summed_loss

    def both(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        outputs: list[Any] = []
        hook = model.register_forward_hook(lambda *call: outputs.append(call[-1]))
        try:
            loss = summed_loss(module, batch)
        finally:
            hook.remove()
        auxiliary = _auxiliary_loss(model, outputs[0])
        # Of candidates that are ranked an item is an example, else a token of an answer. Of no
        # items it counts nothing, and yet all ranks run the same backward pass.
        num_items = len(batch["answers" if "answers" in batch else "answer_positions"])
        return loss + num_items * coefficient * auxiliary

    return both


@torch.no_grad()
def refuse_silent_routers(model: nn.Module, device: torch.device) -> None:
    """Refuse a model that returns no routers' loss; on all ranks, it is left in eval mode."""
    model.eval()
    input_ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    _auxiliary_loss(model, model(input_ids=input_ids, use_cache=False))


def _auxiliary_loss(model: nn.Module, outputs: Any) -> Tensor:
    found: Tensor | None = getattr(outputs, "aux_loss", None)
    if found is None:
        raise ValueError(
            f"The configuration of {type(model).__name__} asks for its routers' loss "
            "(output_router_logits), and its forward pass returns no aux_loss: set "
            "output_router_logits to false in the model's config.json to train without."
        )
    return found
