"""What of a model its targets hold, what other targets would, and what no target reaches.

GEM's budget is a share of all parameters, its targets are layers of the language model. How
far the two are apart is told before a run, so that nobody takes ``all-linear`` for all of a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import nn

from gem_ds.distributed.weights import numel
from gem_ds.models.targets import language_model, linear_layers, weight_names


def describe_reach(
    model: nn.Module, targets: Collection[str], head: Collection[str] = frozenset()
) -> str:
    """One sentence: the shares of the parameters in the targets, in reach, and out of reach.

    For a whole model or one on the meta device; ``targets`` are names of weights, and so is
    ``head``, which does not count. A parameter that is used in several places counts once.
    """
    held: Counter[str] = Counter()
    kinds = _kinds(model, targets)
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


_TARGET, _LINEAR = "targets", "linear layers"


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
            kind = _TARGET
        elif part and not name.startswith(f"{part}.") and id(parameter) not in of_output:
            kind = "outside of the language model"
        elif id(parameter) in tables | of_output:
            kind = "embeddings and output layer"
        elif name in linear:
            kind = _LINEAR
        elif "expert" in name or parameter.dim() > 2:
            kind = "experts and convolutions"
        else:
            kind = "norms and biases"
        kinds[name] = kind
    return kinds
