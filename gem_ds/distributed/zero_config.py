"""The DeepSpeed JSON of a run: read, completed from the flags, checked. No deepspeed here.

"auto" in such a file is resolved by transformers' Trainer, not by DeepSpeed; this project drives
the engine itself and resolves it the same way. A value that contradicts a flag is refused, and so
is what the trainer cannot honour (:mod:`gem_ds.distributed.zero_keys`).

Gradient accumulation happens before the engine, in fp32 (:mod:`gem_ds.sparse.flat_values`), so
the engine is told one micro-batch per step whatever the run accumulates.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gem_ds.distributed.zero_gathers import fill, fill_stage3
from gem_ds.distributed.zero_keys import COMMENTS, check_keys, refuse_requests, shown, taken_keys

Dtype = Literal["fp32", "bf16", "fp16"]

#: DeepSpeed's measure of throughput waits for the device in every forward pass and every step.
_NO_TIMERS = {"throughput": {"enabled": False}}
_MAX_DEPTH = 20

#: Optimizers and schedules whose place the flags' can take, by section.
_TYPES = {
    "optimizer": ("auto", "adam", "adamw"),
    "scheduler": ("auto", "warmuplr", "warmupdecaylr", "warmupcosinelr"),
}
#: Parameters of theirs with the values that a run has anyway.
_SAME_AS_RUN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("torch_adam", "fused"), (True, False)),
    **dict.fromkeys(("adam_w_mode", "bias_correction"), (True,)),
    "amsgrad": (False,),
    "warmup_type": ("linear",),
    "last_batch_iteration": (-1,),
}


@dataclass(frozen=True, kw_only=True)
class RunShape:
    """What the flags and the model say about a run, as far as the JSON speaks of it too."""

    world_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    max_grad_norm: float
    dtype: Dtype
    hidden_size: int
    num_selected: int  # K, or 0 where whole parameters are trained
    blocks: Mapping[str, int] = field(default_factory=dict)  # gem_ds.models.blocks
    #: By name in the ``params`` of these sections: the value of the run, and the flag it is from.
    optimizer: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    scheduler: Mapping[str, tuple[Any, str]] = field(default_factory=dict)


def read_config(path: str | Path) -> dict[str, Any]:
    """What a DeepSpeed JSON holds; a ``ValueError`` says why there is none.

    UTF-8, UTF-16 and UTF-32, with a byte order mark or without.
    """
    where = f"--deepspeed {path}"
    try:
        config = json.loads(Path(path).read_bytes(), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{where} must hold one JSON object.")
    level: list[Any] = [config]
    for _ in range(_MAX_DEPTH):
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
        level = [value for value in level if isinstance(value, dict | list)]
    if level:
        raise ValueError(f"{where} is nested deeper than any configuration of DeepSpeed's.")
    return config


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = Counter(name for name, _ in pairs if not name.startswith(COMMENTS))
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{twice[0]} stands in it twice")
    return dict(pairs)


def zero_stage(config: Mapping[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed configuration asks for (0 where it says nothing)."""
    stage: int = _section(config, "zero_optimization").get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(f"zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}.")
    return int(stage)


def resolve_config(config: dict[str, Any], shape: RunShape) -> dict[str, Any]:
    """A copy, completed for ``deepspeed.initialize``: "auto" is what ``shape`` says.

    Raises:
        ValueError: a value contradicts a flag, or asks for what the trainer cannot honour.
    """
    check_keys(config)
    stage = zero_stage(config)
    _refuse_effectless_offload(config)
    _settle_optimizer(config, shape)
    asked = dict(config)
    if shape.num_selected and asked.get("data_types") == {"grad_accum_dtype": "fp32"}:
        del asked["data_types"]  # selected values accumulate their gradients in fp32 anyway
    refuse_requests(asked)
    config = taken_keys(config)
    accumulation = shape.gradient_accumulation_steps
    global_batch = shape.micro_batch_size * accumulation * shape.world_size
    per_device = "--per_device_train_batch_size"
    _settle(config, "train_micro_batch_size_per_gpu", shape.micro_batch_size, per_device)
    _settle(config, "gradient_accumulation_steps", accumulation, "--gradient_accumulation_steps")
    in_all = f"{per_device} x ranks x --gradient_accumulation_steps"
    _settle(config, "train_batch_size", global_batch, in_all)
    _settle(config, "gradient_clipping", float(shape.max_grad_norm), "--max_grad_norm")
    for dtype in ("bf16", "fp16"):
        section = config.setdefault(dtype, {})
        _settle(section, "enabled", shape.dtype == dtype, f"--{dtype}", prefix=f"{dtype}.")
    if shape.dtype == "fp16" and stage == 0:
        raise ValueError(
            "fp16 needs ZeRO stage 1, 2 or 3: DeepSpeed does not scale the loss at stage 0; use "
            "ds_configs/zero1.json or --bf16."
        )
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = stage
    fill(zero, "reduce_bucket_size", shape.num_selected or shape.hidden_size**2)  # one message
    if shape.num_selected:
        # In the model's dtype a sum over many ranks would lose what is small beside it.
        config.setdefault("communication_data_type", "fp32")
    if stage == 3:
        fill_stage3(zero, shape.hidden_size, shape.blocks)
    _refuse_auto(config)
    config["gradient_accumulation_steps"] = 1
    config["train_batch_size"] = shape.micro_batch_size * shape.world_size
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    config.setdefault("timers", _NO_TIMERS)
    return config


def inference_config(
    config: Mapping[str, Any], *, dtype: str, hidden_size: int, blocks: Mapping[str, int]
) -> dict[str, Any]:
    """The part of a DeepSpeed configuration that a forward pass over ZeRO-3 partitions needs.

    Stage, parameter offload, leaf modules and the sizes of stage 3 are taken; the rest speaks of
    training and is left out, so that the file of a training run serves for evaluation too.
    ``dtype`` is that of the weights, by its torch name; ``blocks`` as in :class:`RunShape`.
    """
    check_keys(config)
    config = taken_keys(config)
    if zero_stage(config) < 3:
        raise ValueError(
            f"The DeepSpeed JSON is of ZeRO stage {zero_stage(config)}, which leaves the model "
            "whole on each rank: use ds_configs/zero3.json, or leave --deepspeed out."
        )
    zero = {
        key: value
        for key, value in config["zero_optimization"].items()
        if key in ("stage", "offload_param", "leaf_module") or key.startswith("stage3_")
    }
    fill_stage3(zero, hidden_size, blocks)
    inference = {
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**31 - 1,
        "timers": _NO_TIMERS,
    }
    _refuse_auto(inference)
    return inference


def _section(config: Mapping[str, Any], name: str, path: str = "") -> dict[str, Any]:
    section = config.get(name)
    if not (section is None or isinstance(section, dict)):
        raise ValueError(f"{path or name} in the DeepSpeed JSON must be an object.")
    return section or {}


def _refuse_effectless_offload(config: Mapping[str, Any]) -> None:
    zero = taken_keys(config).get("zero_optimization", {})
    for key, least_stage in (("offload_optimizer", 1), ("offload_param", 3)):
        device = zero.get(key, {}).get("device", "none")
        if device != "none" and zero_stage(config) < least_stage:
            raise ValueError(
                f"zero_optimization.{key} has no effect below stage {least_stage}: raise "
                "zero_optimization.stage, or remove it."
            )
        if device == "nvme":
            raise ValueError(
                f"zero_optimization.{key}.device is nvme, which updates do not reach: use cpu."
            )


def _settle_optimizer(config: Mapping[str, Any], shape: RunShape) -> None:
    """Refuse an optimizer or a schedule that is not the run's; the flags decide."""
    for name, of_flags in (("optimizer", shape.optimizer), ("scheduler", shape.scheduler)):
        section = _section(config, name)
        kind, params = section.get("type", "auto"), _section(section, "params", f"{name}.params")
        if str(kind).lower() not in _TYPES[name]:
            raise ValueError(
                f"{name}.type is {shown(kind)} in the DeepSpeed JSON, which GEM has not: remove "
                "the section, and the flags set it."
            )
        if unknown := section.keys() - {"type", "params", "legacy_fusion"}:
            raise ValueError(
                f"Remove {name}.{min(unknown)} from the DeepSpeed JSON: nobody reads it."
            )
        for key, value in params.items():
            if value in ("auto", None) or value in _SAME_AS_RUN.get(key, ()):
                continue
            if key not in of_flags:
                raise ValueError(
                    f"{name}.params.{key} is {shown(value)} in the DeepSpeed JSON, and no flag "
                    'sets it: write "auto" or remove the line.'
                )
            _settle(dict(params), key, *of_flags[key], prefix=f"{name}.params.")


def _settle(
    section: dict[str, Any], key: str, value: int | float | bool, flag: str, prefix: str = ""
) -> None:
    given = section.get(key, "auto")
    if given != "auto" and given != value:
        raise ValueError(
            f"{prefix}{key} is {shown(given)} in the DeepSpeed JSON but {flag} makes it "
            f'{shown(value)}: make them equal, or write "auto" in the JSON.'
        )
    section[key] = value


def _refuse_auto(section: dict[str, Any], path: str = "") -> None:
    for key, value in section.items():
        if value == "auto":
            raise ValueError(
                f'{path}{key} is "auto" in the DeepSpeed JSON, and no flag gives it a value: '
                "write the value or remove the line."
            )
        if isinstance(value, dict):
            _refuse_auto(value, f"{path}{key}.")
