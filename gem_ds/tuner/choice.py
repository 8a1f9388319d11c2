"""Which weights of a model an adapter takes, by the names in its configuration.

peft matches names of modules. A projection of experts is a parameter, and is named as if it were a
module, as elsewhere here (:mod:`gem_ds.models.targets`): peft's ``target_parameters`` wraps each in
a layer of its own, for LoRA alone, where one forward pass here computes with all.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils import resolve_quantization_backend
from torch import nn

from gem_ds.distributed.weights import shape_of
from gem_ds.sparse.experts import PROJECTIONS, projections_of
from gem_ds.sparse.kinds import kind_of
from gem_ds.tuner.layer import GemLayer


def has_chosen(peft_config: Any, key: str) -> Any:
    """Whether a module has weights that are named and have entries; in peft's terms."""
    parameters = [p for p in ("weight", *PROJECTIONS) if peft_config.count(f"{key}.{p}")]
    if not parameters:
        found = check_target_module_exists(peft_config, key)
        return found if isinstance(found, _ExcludedModule) else False
    return max((is_chosen(peft_config, key, p) for p in parameters), key=bool)


def is_chosen(peft_config: Any, key: str, parameter: str) -> Any:
    """Whether a weight is named: by its module or, of experts, by the projection that it is."""
    found = check_target_module_exists(peft_config, key)
    if parameter == "weight" or isinstance(found, _ExcludedModule):
        return found
    own = check_target_module_exists(peft_config, f"{key}.{parameter}")
    return own if isinstance(own, _ExcludedModule) else found or own


def all_linear(model: nn.Module) -> set[str]:
    """The modules that can be targets, those of experts too, but for the output layer."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {n for n, m in model.named_modules() if m is not output and shapes_of(m)}


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The whole shapes of a module's weights that can be targets, by their names in it."""
    if isinstance(module, GemLayer):
        return {name: weight.shape for name, weight in module.weights.items()}
    if kind_of(module) is not None:
        names = projections_of(module) or ["weight"]
        return {name: shape_of(module.get_parameter(name)) for name in names}
    if resolve_quantization_backend(module) is not None:
        return {"weight": (module.out_features, module.in_features)}  # type: ignore[dict-item]
    return {}
