"""How an evaluator is told of what each method has trained."""

from __future__ import annotations

from dataclasses import dataclass

from gem_ds.methods import ADAPTER_METHODS, METHODS, SPARSE_METHODS


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What stands for ``{model}`` and ``{weights}`` in an evaluation command.

    Attributes:
        model: ``{model}`` is the base model; ``{output_dir}`` the folder of the run.
        flags: follow the model.
    """

    model: str = "{model}"
    flags: tuple[str, ...] = ()


_DELTA = Weights(flags=("--delta", "{output_dir}/delta.safetensors"))
_ADAPTER = Weights(flags=("--adapter", "{output_dir}/adapter"))
_MODEL = Weights(model="{output_dir}/model")

WEIGHTS = (
    dict.fromkeys((*SPARSE_METHODS, "bitfit"), _DELTA)
    | dict.fromkeys(ADAPTER_METHODS, _ADAPTER)
    | {"full": _MODEL}
)
assert WEIGHTS.keys() == set(METHODS)
