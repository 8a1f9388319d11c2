"""Every way to fine-tune that ``--method`` names, and what it leaves.

The sparse ones are the rules of :mod:`gem_ds.select.rules`. The others, which they are compared
with, train whole parameters: of the model itself, or ones that the library peft adds to it.
"""

from typing import Literal

from gem_ds.select.rules import RULES, SPARSE_METHODS

_DENSE = {"full": "all parameters", "bitfit": "the biases (arXiv 2106.10199)"}
_ADAPTERS = {"lora": "arXiv 2106.09685", "ia3": "arXiv 2205.05638", "shira": "arXiv 2406.13175"}
DENSE_METHODS, ADAPTER_METHODS = tuple(_DENSE), tuple(_ADAPTERS)
METHODS = (*SPARSE_METHODS, *DENSE_METHODS, *ADAPTER_METHODS)


def methods_help() -> str:
    """One line on each method, for ``--help``."""
    rules = {name: rule.help for name, rule in RULES.items()}
    lines = [f"{name}, {text}" for name, text in (rules | _DENSE | _ADAPTERS).items()]
    return "; ".join(lines)


def product_of(method: str) -> Literal["delta", "adapter", "model"]:
    """What a finished run leaves: ``delta.safetensors``, ``adapter/`` of peft, or ``model/``."""
    if method == "full":
        return "model"
    return "adapter" if method in ADAPTER_METHODS else "delta"
