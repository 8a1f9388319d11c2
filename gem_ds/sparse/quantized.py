"""Weights that a library keeps in 4 or 8 bits, as the numbers that their layers compute with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Linear layers of bitsandbytes, by the names of their classes.
_BITSANDBYTES = ("Linear4bit", "Linear8bitLt")


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a linear layer of bitsandbytes, of 4 or 8 bits."""
    return type(module).__name__ in _BITSANDBYTES


@torch.no_grad()
def dequantized(module: nn.Module, backend: Any = None) -> Tensor:
    """The weight of a quantized linear layer, [out, in], in the dtype that it had before.

    peft's ``backend`` knows how the layer's library does it, but not what bitsandbytes has laid out
    for its kernel on CPUs. None finds it.
    """
    from peft.utils import resolve_quantization_backend

    layer: Any = module
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        layer.state_dict()  # lays it back
    backend = backend or resolve_quantization_backend(module)
    weight: Tensor = backend.get_base_weight(module)
    return weight


def computed_in(
    dtype: torch.dtype, product: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, bias: Any
) -> Tensor:
    """A layer's product of x and bias in the dtype in which it computes, in the dtype of x."""
    return product(x.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """What decides the bits of a quantized model's weights; None where they are not quantized."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    given = config if isinstance(config, dict) else config.to_dict()
    names = ("quant_method", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "load_in_8bit")
    return {n: str(getattr(given[n], "value", given[n])) for n in names if n in given}
