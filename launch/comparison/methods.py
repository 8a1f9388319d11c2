"""The methods that can be compared, and how an evaluator is told of what each has trained."""

from __future__ import annotations

from dataclasses import dataclass


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

METHODS = {
    "gem": _DELTA,
    "ratio": _DELTA,
    "gradient": _DELTA,
    "entropy_gradient": _DELTA,
    "magnitude": _DELTA,
    "random": _DELTA,
    "supertuning": _DELTA,
    "full": _DELTA,
    "bitfit": _DELTA,
    "lora": _ADAPTER,
    "shira": _ADAPTER,
    "ia3": _ADAPTER,
}
