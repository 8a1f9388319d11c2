"""The blocks that a model repeats: what ZeRO-3 gathers together and checkpointing recomputes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from gem_ds.models.encoders import auto_class


def block_sizes(model: nn.Module) -> dict[str, int]:
    """Entries of the largest block of each class, by the class's name; empty if there is none."""
    # Versions that recompute a block by calling it anew, with all that hooks do, have none.
    if "__call__" in vars(GradientCheckpointingLayer):
        return {}
    sizes: dict[str, int] = {}
    for block in find_blocks(model).values():
        name, size = type(block).__name__, sum(p.numel() for p in block.parameters())
        sizes[name] = max(size, sizes.get(name, 0))
    return sizes


def find_blocks(model: nn.Module, name: str = "") -> dict[str, nn.Module]:
    """The outermost ``GradientCheckpointingLayer``s of a model of transformers, by their names."""
    if isinstance(model, GradientCheckpointingLayer):
        return {name: model}
    found: dict[str, nn.Module] = {}
    for child, module in model.named_children():
        found |= find_blocks(module, f"{name}.{child}" if name else child)
    return found


def model_of(config: PretrainedConfig, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The model that a configuration describes, on the meta device, where it costs nothing."""
    with torch.device("meta"):
        return auto_class(config).from_config(
            config, trust_remote_code=trust_remote_code, **options
        )


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Let the blocks of a model recompute their activations in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    # A reentrant block would run a backward of its own (see `gem_ds.sparse.flat_values`).
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    stop_input_gradients(model)


def stop_input_gradients(model: Any) -> None:
    """Let no gradient run to the embedding's output, as transformers and peft ask for.

    Without it (reentrant blocks would need one) nothing below the lowest trained layer runs a
    backward pass, and ZeRO-3 gathers the embedding for the forward pass only.
    """
    if getattr(model, "_require_grads_hook", None) is not None:
        model.disable_input_require_grads()
