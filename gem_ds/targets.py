"""Which layers GEM selects from: the query and value projections, or what the user names.

A target is a *parameter*: the weight matrix of a linear layer. One that is also used elsewhere
(tied) is refused, and ``all-linear`` leaves out the output layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

_Q_PROJ_MODELS = """
    cohere cohere2 exaone4 gemma gemma2 gemma3_text gpt_neo gptj granite helium llama
    ministral mistral mixtral nemotron olmo olmo2 olmo3 opt phi qwen2 qwen2_moe qwen3 qwen3_moe
    smollm3 stablelm starcoder2
"""
_QUERY_MODELS = "bert camembert electra ernie roberta xlm-roberta"

#: Module-name suffixes of the query and value projections, by ``config.model_type``.
QUERY_VALUE_SUFFIXES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(_Q_PROJ_MODELS.split(), ("q_proj", "v_proj")),
    **dict.fromkeys(_QUERY_MODELS.split(), ("query", "value")),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
}

#: Models that compute query, key and value in one matrix, and the name of that module.
FUSED_SUFFIXES = {
    "gpt2": "c_attn",
    "gpt_bigcode": "c_attn",
    "gpt_neox": "query_key_value",
    "bloom": "query_key_value",
    "falcon": "query_key_value",
    "phi3": "qkv_proj",
    "mpt": "Wqkv",
    "dbrx": "Wqkv",
    "modernbert": "Wqkv",
    "deberta": "in_proj",
    "chatglm": "query_key_value",
}

ALL_LINEAR = "all-linear"


#: Models whose tokens see each other both ways unless their configuration says ``is_decoder``.
ENCODERS = (*_QUERY_MODELS.split(), "deberta", "deberta-v2", "distilbert", "modernbert")


def find_targets(
    model: nn.Module, target_modules: Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """The linear layers that GEM selects from, by the names of their weights.

    Args:
        model: a transformers model, whole or partitioned.
        target_modules: None for the query and value projections of the architecture; module-name
            suffixes such as ``["q_proj", "v_proj"]``; one regular expression that a whole module
            name must match; or ``["all-linear"]``, every linear layer but the output layer.

    Returns:
        weight name -> module, in ``named_parameters`` order.

    Raises:
        ValueError: a name matches nothing, a match is no linear layer, a weight is tied to another
            module, or the architecture fuses the projections; the sentence says what to pass.
    """
    patterns = list(target_modules) if target_modules else _default_targets(model)
    modules = {name: module for name, module in model.named_modules() if name}
    if patterns == [ALL_LINEAR]:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = {n: m for n, m in modules.items() if _is_linear(m) and m is not output}
    else:
        chosen = _matching(modules, patterns)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    targets: dict[str, nn.Module] = {}
    for name, module in chosen.items():
        if not _is_linear(module):
            raise ValueError(
                f"--target_modules {' '.join(patterns)} matches {name}, a "
                f"{type(module).__name__}: only linear layers can be targets."
            )
        names = owners[id(module.get_parameter("weight"))]
        if len(names) > 1:
            others = ", ".join(other for other in names if other != f"{name}.weight")
            raise ValueError(
                f"{name} shares its weight with {others}: leave it out of --target_modules, "
                "tied weights cannot be targets."
            )
        targets[f"{name}.weight"] = module
    order = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    return dict(sorted(targets.items(), key=lambda item: order[item[0]]))


def _is_linear(module: nn.Module) -> bool:
    """A subclass that computes something else of its weight cannot stand in for a linear layer."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward) or (
        type(module).__name__ == "FalconLinear"  # the same product, written out
    )


def _matching(modules: dict[str, nn.Module], patterns: list[str]) -> dict[str, nn.Module]:
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        matching = {n: m for n, m in modules.items() if n == pattern or n.endswith(f".{pattern}")}
        if not matching and len(patterns) == 1:
            matching = {n: m for n, m in modules.items() if _full_match(pattern, n)}
        if not matching:
            linear = {n.rpartition(".")[2] for n, m in modules.items() if _is_linear(m)}
            raise ValueError(
                f"--target_modules {pattern} matches no module of this model; its linear layers "
                f"are named {', '.join(sorted(linear))}."
            )
        chosen |= matching
    return chosen


def _full_match(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(
            f"--target_modules {pattern} is neither a module name nor a regular expression: "
            f"{error}."
        ) from None


def _default_targets(model: nn.Module) -> list[str]:
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type in FUSED_SUFFIXES:
        raise ValueError(
            f"{model_type} computes query, key and value in one matrix: pass --target_modules "
            f"{FUSED_SUFFIXES[model_type]} to select from all three, or all-linear."
        )
    if model_type not in QUERY_VALUE_SUFFIXES:
        raise ValueError(
            f"The query and value projections of {model_type} are not known: name the layers to "
            "select from with --target_modules, or pass all-linear."
        )
    return list(QUERY_VALUE_SUFFIXES[model_type])


def targets_of(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The linear layers that own the named weights, in ``named_parameters`` order.

    Raises:
        ValueError: a name is not the weight of a linear layer that nothing else uses.
    """
    modules = "|".join(re.escape(name.removesuffix(".weight")) for name in names)
    return find_targets(model, [f"(?:{modules})"])  # as an expression a name is no suffix
