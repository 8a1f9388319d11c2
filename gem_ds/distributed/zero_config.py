"""The DeepSpeed JSON of a run: read, completed from the flags, checked. No deepspeed here.

"auto" in such a file is resolved by transformers' Trainer, not by DeepSpeed; this project drives
the engine itself and resolves it the same way. A value that contradicts a flag is refused, and so
is what the trainer cannot honour.

Gradient accumulation happens before the engine, in fp32 (:mod:`gem_ds.sparse.flat_values`), so
the engine is told one micro-batch per step whatever the run accumulates.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Dtype = Literal["fp32", "bf16", "fp16"]

_REFUSED_SECTIONS = {
    "optimizer": "GEM brings its own optimizer; set it with --learning_rate and its neighbours",
    "scheduler": "set the schedule with --lr_scheduler_type and --warmup_steps",
    "bfloat16": "call the section bf16",
    "data_types": "how gradients accumulate is the trainer's business",
    "torch_autocast": "use --bf16 or --fp16",
    "amp": "use --bf16 or --fp16",
    "tensor_parallel": "GEM shards over data-parallel ranks only",
    "autotp_size": "GEM shards over data-parallel ranks only",
    "sequence_parallel_size": "GEM shards over data-parallel ranks only",
    "expert_parallel": "GEM shards over data-parallel ranks only",
    "pipeline": "GEM shards over data-parallel ranks only",
    "compression_training": "it changes weights that GEM keeps",
    "curriculum_learning": "the order of the data is the trainer's",
    "data_efficiency": "the order of the data is the trainer's",
    "progressive_layer_drop": "every target layer must run in every step",
    "elasticity": "resume a checkpoint on another number of ranks instead",
    "hybrid_engine": "it is for reinforcement learning",
    "compile": "the trainer needs DeepSpeed's eager hooks",
    "zero_force_ds_cpu_optimizer": "GEM brings its own optimizer and sets this itself",
    "zero_allow_untested_optimizer": "GEM brings its own optimizer and sets this itself",
}
_REFUSED_ZERO = {
    "zero_hpz_partition_size": "hpZ keeps second copies of the weights that updates do not reach",
    "mics_shard_size": "MiCS partitions weights in a way that updates do not reach",
    "zero_quantized_weights": "quantized weights do not show an update exactly",
    "zero_quantized_nontrainable_weights": "quantized weights do not show an update exactly",
    "zero_quantized_gradients": "the gradient of the selected entries is sent as it is",
    "zenflow": "it replaces the optimizer",
}
_LOW_PRECISION_MASTERS = (
    "bf16_master_weights_and_grads",
    "bf16_optimizer_states",
    "fp16_master_weights_and_grads",
)
#: DeepSpeed's measure of throughput waits for the device in every forward pass and every step.
_NO_TIMERS = {"throughput": {"enabled": False}}


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


def read_config(path: str | Path) -> dict[str, Any]:
    """What a DeepSpeed JSON holds; a ``ValueError`` says why there is none."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--deepspeed {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"--deepspeed {path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed {path} must hold one JSON object.")
    return config


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
    config = copy.deepcopy(config)
    _refuse(config)
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
    stage = zero_stage(config)
    if shape.dtype == "fp16" and stage == 0:
        raise ValueError(
            "fp16 needs ZeRO stage 1, 2 or 3: DeepSpeed does not scale the loss at stage 0; use "
            "ds_configs/zero1.json or --bf16."
        )
    zero = config.setdefault("zero_optimization", {"stage": 0})
    _fill(zero, "reduce_bucket_size", shape.num_selected or shape.hidden_size**2)  # one message
    if shape.num_selected:
        # In the model's dtype a sum over many ranks would lose what is small beside it.
        config.setdefault("communication_data_type", "fp32")
    if stage == 3:
        _fill_stage3(zero, shape.hidden_size)
    _refuse_auto(config)
    config["gradient_accumulation_steps"] = 1
    config["train_batch_size"] = shape.micro_batch_size * shape.world_size
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    config.setdefault("timers", _NO_TIMERS)
    return config


def inference_config(config: Mapping[str, Any], *, dtype: str, hidden_size: int) -> dict[str, Any]:
    """The part of a DeepSpeed configuration that a forward pass over ZeRO-3 partitions needs.

    Stage, parameter offload and the sizes of stage 3 are taken; the rest speaks of training and is
    left out, so that the file of a training run serves for evaluation too. ``dtype`` is that of the
    weights, by its torch name.
    """
    if zero_stage(config) < 3:
        raise ValueError(
            f"The DeepSpeed JSON is of ZeRO stage {zero_stage(config)}, which leaves the model "
            "whole on each rank: use ds_configs/zero3.json, or leave --deepspeed out."
        )
    zero = {
        key: copy.deepcopy(value)
        for key, value in config["zero_optimization"].items()
        if key in ("stage", "offload_param") or key.startswith("stage3_")
    }
    _fill_stage3(zero, hidden_size)
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


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"{name} in the DeepSpeed JSON must be an object.")
    return section


def _refuse(config: dict[str, Any]) -> None:
    for key, reason in _REFUSED_SECTIONS.items():
        if config.get(key):
            raise ValueError(f"Remove {key} from the DeepSpeed JSON: {reason}.")
    zero = _section(config, "zero_optimization")
    for key, reason in _REFUSED_ZERO.items():
        value = zero.get(key)
        if value and not (key == "zero_hpz_partition_size" and value == 1) and value != -1:
            raise ValueError(f"Remove zero_optimization.{key} from the DeepSpeed JSON: {reason}.")
    for key, least_stage in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = _section(zero, key)
        if offload.get("device", "none") != "none" and zero_stage(config) < least_stage:
            raise ValueError(
                f"zero_optimization.{key} has no effect below stage {least_stage}: raise "
                "zero_optimization.stage, or remove it."
            )
        if offload.get("device") == "nvme":
            raise ValueError(
                f"zero_optimization.{key}.device is nvme, which updates do not reach: use cpu."
            )
        if offload.get("super_offload") or offload.get("ratio", 1) != 1:
            raise ValueError(
                f"Remove super_offload and ratio from zero_optimization.{key}: they need an "
                "optimizer of DeepSpeed's."
            )
    for section, key in (
        (config, "managed_gradient_accumulation"),
        (zero, "compute_grad_norm"),
        (_section(config, "bf16"), "check_grad_overflow"),
    ):
        if section.get(key) is False:
            raise ValueError(f"Remove {key} from the DeepSpeed JSON: GEM needs it on.")
    for dtype in ("bf16", "fp16"):
        for key in _LOW_PRECISION_MASTERS:
            if _section(config, dtype).get(key):
                raise ValueError(f"Remove {dtype}.{key}: GEM keeps fp32 masters and moments.")


def _settle(
    section: dict[str, Any], key: str, value: int | float | bool, flag: str, prefix: str = ""
) -> None:
    given = section.get(key, "auto")
    if given != "auto" and given != value:
        raise ValueError(
            f"{prefix}{key} is {json.dumps(given)} in the DeepSpeed JSON but {flag} makes it "
            f'{json.dumps(value)}: make them equal, or write "auto" in the JSON.'
        )
    section[key] = value


def _fill(section: dict[str, Any], key: str, value: int) -> None:
    if section.get(key, "auto") == "auto":
        section[key] = value


def _fill_stage3(zero: dict[str, Any], hidden_size: int) -> None:
    _fill(zero, "stage3_prefetch_bucket_size", int(0.9 * hidden_size**2))
    _fill(zero, "stage3_param_persistence_threshold", 10 * hidden_size)


def _refuse_auto(section: dict[str, Any], path: str = "") -> None:
    for key, value in section.items():
        if value == "auto":
            raise ValueError(
                f'{path}{key} is "auto" in the DeepSpeed JSON, and no flag gives it a value: '
                "write the value or remove the line."
            )
        if isinstance(value, dict):
            _refuse_auto(value, f"{path}{key}.")
