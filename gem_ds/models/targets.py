"""Which layers GEM selects from: the query and value projections, or what the user names.

A target is a *parameter*: the weight matrix of a linear layer, or those of a projection of all
experts of a block. One that is also used elsewhere (tied) is refused. Of a model that reads images
or sound too, targets are layers of its language model: nothing else is reached from text.

GEM's budget is a share of all parameters: how far the targets are from these, a run tells before
(:func:`describe_reach`), so that nobody takes ``all-linear`` for all of a model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

from torch import nn

from gem_ds.distributed.weights import numel
from gem_ds.sparse.experts import projections_of
from gem_ds.sparse.kinds import kind_of

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

_TARGET, _LINEAR = "targets", "linear layers"


def find_targets(
    model: nn.Module, target_modules: Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """The layers that GEM selects from, by their weights' names, in the parameters' order.

    ``target_modules`` is None for the query and value projections of the architecture; module-name
    suffixes such as ``["q_proj", "v_proj"]``; one regular expression that a whole module name must
    match; or ``["all-linear"]``, every linear layer but the output layer. A projection of experts
    counts as a module, ``["experts.down_proj"]``; ``["experts"]`` are all.
    """
    everywhere, part = _modules(model), language_model(model)
    modules = {n: m for n, m in everywhere.items() if n.startswith(f"{part}.")} or everywhere
    patterns = list(target_modules) if target_modules else _default_targets(model, modules)
    if patterns == [ALL_LINEAR]:
        return _checked(model, linear_layers(model, modules), patterns)
    return _checked(model, _matching(modules, patterns, everywhere), patterns)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by name; a projection of experts is there too, as the module that it is of."""
    modules = {name: module for name, module in model.named_modules() if name}
    for name, module in list(modules.items()):
        modules |= {f"{name}.{projection}": module for projection in projections_of(module)}
    return modules


def weight_names(name: str, module: nn.Module) -> list[str]:
    """The weights of a layer that can be a target, or the one projection that the name is of."""
    projections = projections_of(module)
    if name.rpartition(".")[2] in projections:
        return [name]
    return [f"{name}.{weight}" for weight in projections or ["weight"]]


def language_model(model: nn.Module) -> str:
    """The module that reads text in a model that reads images or sound too; else the empty name."""
    config: Any = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return ""
    decoder = cast(Any, model).get_decoder()
    return next(str(name) for name, module in model.named_modules() if module is decoder)


def linear_layers(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of the modules that ``all-linear`` means: all but the output layer."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {n: m for n, m in modules.items() if kind_of(m) and m is not output}


def _checked(
    model: nn.Module, chosen: Mapping[str, nn.Module], patterns: list[str]
) -> dict[str, nn.Module]:
    """The chosen layers by their weights' names, in the parameters' order."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    targets: dict[str, nn.Module] = {}
    for name, module in chosen.items():
        if kind_of(module) is None:
            raise ValueError(
                f"--target_modules {' '.join(patterns)} matches {name}, a "
                f"{type(module).__name__}: only linear layers and experts can be targets."
            )
        for weight in weight_names(name, module):
            names = owners[id(model.get_parameter(weight))]
            if len(names) > 1:
                others = ", ".join(other for other in names if other != weight)
                raise ValueError(
                    f"{name} shares its weight with {others}: leave it out of --target_modules, "
                    "tied weights cannot be targets."
                )
            targets[weight] = module
    return {name: targets[name] for name, _ in model.named_parameters() if name in targets}


def _matching(
    modules: dict[str, nn.Module], patterns: list[str], everywhere: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """The modules that the patterns name; ``everywhere`` are those of the whole model."""
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        found = _matches(everywhere, pattern, is_expression=len(patterns) == 1)
        matching = {name: module for name, module in found.items() if name in modules}
        if found and not matching:
            raise ValueError(
                f"--target_modules {pattern} matches {next(iter(found))}, which no text reaches: "
                "name layers of the language model."
            )
        if not matching:
            raise ValueError(
                f"--target_modules {pattern} matches no module of this model; its linear layers "
                f"are named {', '.join(_linear_names(modules))}."
            )
        chosen |= matching
    return chosen


def _linear_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """The last parts of the names of what can be a target."""
    return sorted({name.rpartition(".")[2] for name, module in modules.items() if kind_of(module)})


def _matches(
    modules: Mapping[str, nn.Module], pattern: str, *, is_expression: bool
) -> dict[str, nn.Module]:
    """The modules of this name, of names that end in it, or that an expression matches wholly."""
    matching = {n: m for n, m in modules.items() if n == pattern or n.endswith(f".{pattern}")}
    if matching or not is_expression:
        return matching
    try:
        return {n: m for n, m in modules.items() if re.fullmatch(pattern, n)}
    except re.error as error:
        raise ValueError(
            f"--target_modules {pattern} is neither a module name nor a regular expression: "
            f"{error}."
        ) from None


def _default_targets(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    linear = _linear_names(modules)
    for pair in QUERY_VALUE_NAMES:
        if set(pair).issubset(linear):
            return list(pair)
    for name in FUSED_NAMES:
        if name in linear:
            raise ValueError(
                f"{model_type} computes query, key and value in one matrix: pass --target_modules "
                f"{name} to select from all three, or all-linear."
            )
    raise ValueError(
        f"The query and value projections of {model_type} are not known: name the layers to select "
        f"from with --target_modules, of {', '.join(linear)}, or pass all-linear."
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
    """The layers that own the named weights, in their order; raises as `find_targets`."""
    modules = _modules(model)
    chosen = [name.removesuffix(".weight") for name in names]
    if missing := [name for name in chosen if name not in modules]:
        raise ValueError(f"This model has no module {missing[0]}: pass the model of the mask.")
    return _checked(model, {name: modules[name] for name in chosen}, chosen)


def describe_reach(
    model: nn.Module, targets: Collection[str], head: Collection[str] = frozenset()
) -> str:
    """One sentence: the shares of the parameters in the targets, in reach, and out of reach.

    ``targets`` are names of weights, and so is ``head``, which does not count. A parameter that is
    used in several places counts once.
    """
    held, kinds = Counter[str](), _kinds(model, targets)
    for name, parameter in model.named_parameters():
        if name not in head:
            held[kinds[name]] += numel(parameter)

    def share(*of: str) -> str:
        return f"{sum(held[kind] for kind in of) / held.total():.1%}"

    text = f"The {len(targets)} target layers hold {share(_TARGET)} of the parameters"
    if held[_LINEAR]:
        text += f", those of --target_modules all-linear {share(_TARGET, _LINEAR)}"
    others = [kind for kind, _ in held.most_common() if kind not in (_TARGET, _LINEAR)]
    told = ", ".join(f"{kind} {share(kind)}" for kind in others)
    return f"{text}; no target reaches {share(*others)} ({told}), which --method full trains"


def _kinds(model: nn.Module, targets: Collection[str]) -> dict[str, str]:
    """What each parameter is, by its name."""
    part = language_model(model)
    layers = linear_layers(model, dict(model.named_modules()))
    linear = {weight for n, module in layers.items() for weight in weight_names(n, module)}
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    of_output = set(map(id, output.parameters())) if isinstance(output, nn.Module) else set()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    kinds = {}
    for name, parameter in model.named_parameters():
        if name in targets:
            kinds[name] = _TARGET
        elif part and not name.startswith(f"{part}.") and id(parameter) not in of_output:
            kinds[name] = "outside of the language model"
        elif id(parameter) in tables | of_output:
            kinds[name] = "embeddings and output layer"
        elif name in linear:
            kinds[name] = _LINEAR
        elif "expert" in name or parameter.dim() > 2:
            kinds[name] = "experts and convolutions"
        else:
            kinds[name] = "norms and biases"
    return kinds
