"""How an evaluator is told of what each method has trained."""

from __future__ import annotations

from dataclasses import dataclass

from gem_ds.methods import product_of


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What stands for ``{model}`` and ``{weights}`` in an evaluation command.

    Attributes:
        model: ``{model}`` is the base model; ``{output_dir}`` the folder of the run.
        flags: follow the model.
    """

    model: str = "{model}"
    flags: tuple[str, ...] = ()


_WEIGHTS = {
    "delta": Weights(flags=("--delta", "{output_dir}/delta.safetensors")),
    "adapter": Weights(flags=("--adapter", "{output_dir}/adapter")),
    "model": Weights(model="{output_dir}/model"),
}


def weights_of(method: str) -> Weights:
    """What an evaluator is told of a run of this method."""
    return _WEIGHTS[product_of(method)]
