"""Which layers GEM selects from: the query and value projections, or what the user names.

A target is a *parameter*: the weight matrix of a linear layer. One that is also used elsewhere
(tied) is refused, and ``all-linear`` leaves out the output layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from gem_ds.sparse.layers import kind_of

#: What architectures call their query and value projections.
QUERY_VALUE_NAMES = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
)

#: What architectures call a layer that computes query, key and value in one matrix.
FUSED_NAMES = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")

ALL_LINEAR = "all-linear"


def find_targets(
    model: nn.Module, target_modules: Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """The linear layers that GEM selects from, by their weights' names, in the parameters' order.

    ``target_modules`` is None for the query and value projections of the architecture; module-name
    suffixes such as ``["q_proj", "v_proj"]``; one regular expression that a whole module name must
    match; or ``["all-linear"]``, every linear layer but the output layer.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    patterns = list(target_modules) if target_modules else _default_targets(model, modules)
    if patterns == [ALL_LINEAR]:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = {n: m for n, m in modules.items() if kind_of(m) and m is not output}
    else:
        chosen = _matching(modules, patterns)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    targets: dict[str, nn.Module] = {}
    for name, module in chosen.items():
        if kind_of(module) is None:
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


def _matching(modules: dict[str, nn.Module], patterns: list[str]) -> dict[str, nn.Module]:
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        matching = {n: m for n, m in modules.items() if n == pattern or n.endswith(f".{pattern}")}
        if not matching and len(patterns) == 1:
            try:
                matching = {n: m for n, m in modules.items() if re.fullmatch(pattern, n)}
            except re.error as error:
                raise ValueError(
                    f"--target_modules {pattern} is neither a module name nor a regular "
                    f"expression: {error}."
                ) from None
        if not matching:
            linear = {n.rpartition(".")[2] for n, m in modules.items() if kind_of(m)}
            raise ValueError(
                f"--target_modules {pattern} matches no module of this model; its linear layers "
                f"are named {', '.join(sorted(linear))}."
            )
        chosen |= matching
    return chosen


def _default_targets(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    linear = {name.rpartition(".")[2] for name, module in modules.items() if kind_of(module)}
    for pair in QUERY_VALUE_NAMES:
        if linear.issuperset(pair):
            return list(pair)
    for name in FUSED_NAMES:
        if name in linear:
            raise ValueError(
                f"{model_type} computes query, key and value in one matrix: pass --target_modules "
                f"{name} to select from all three, or all-linear."
            )
    raise ValueError(
        f"The query and value projections of {model_type} are not known: name the layers to select "
        f"from with --target_modules, of {', '.join(sorted(linear))}, or pass all-linear."
    )


def head_layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The whole linear layers that own the parameters of a task head, by their weights' names."""
    owners: dict[str, set[str]] = {}
    for name in names:
        owner, _, part = name.rpartition(".")
        owners.setdefault(owner, set()).add(part)
    layers: dict[str, nn.Module] = {}
    for owner, parts in owners.items():
        module = model.get_submodule(owner)
        is_whole = parts == {n for n, _ in module.named_parameters()}
        if not (isinstance(module, nn.Linear) and kind_of(module) and is_whole):
            raise ValueError(
                f"The model's head has parameters {', '.join(sorted(parts))} of {owner}, a "
                f"{type(module).__name__}: only heads of whole linear layers can be trained."
            )
        layers[f"{owner}.weight"] = module
    return layers


def targets_of(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The linear layers that own the named weights, in their order; raises as `find_targets`."""
    modules = "|".join(re.escape(name.removesuffix(".weight")) for name in names)
    return find_targets(model, [f"(?:{modules})"])  # as an expression a name is no suffix
