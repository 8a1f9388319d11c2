"""Every key of a DeepSpeed JSON: whether it is taken, passed over with a word, or refused.

The keys are those of DeepSpeed 0.19, with what trainers around it write into the same files. What a
value must be is what DeepSpeed would check of it later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Taken:
    """A key that is settled with the flags, or that DeepSpeed gets as it is written."""

    words: str  # what the value must be
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Ignored:
    """A key that decides nothing here; the run says so, unless it asks for nothing."""

    why: str
    nothing: object = None  # a value that asks for nothing, beside those that are empty


@dataclass(frozen=True)
class Refused:
    """A key that asks for what a run cannot honour, unless it asks for nothing."""

    why: str
    nothing: object = None


Treatment = Taken | Ignored | Refused


def _is_number(value: Any, least: float = 0) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= least


def _is_whole(value: Any, least: int = 0) -> bool:
    return _is_number(value, least) and float(value).is_integer()


def _one_of(*names: str) -> Taken:
    words = f"one of {', '.join(names)}"
    return Taken(words, lambda value: value in names)


_SETTLED = Taken("what the flags say", lambda value: True)
_SWITCH = Taken("true or false", lambda value: isinstance(value, bool))
_COUNT = Taken("a whole number of at least 1", lambda value: _is_whole(value, least=1))
_SIZE = Taken("a whole number of at least 0", _is_whole)
_NUMBER = Taken("a finite number of at least 0", _is_number)
_SHARE = Taken("between 0 and 1", lambda value: _is_number(value) and value <= 1)
_TEXT = Taken("a text", lambda value: isinstance(value, str))
_NAMES = Taken(
    "a list of texts",
    lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
)
_SECTION = Taken("an object", lambda value: isinstance(value, dict))
_DTYPE = _one_of("fp32", "fp16", "bf16")

_SETS_ITSELF = "GEM brings its own optimizer and sets this itself"
_AVERAGED = "gradients are averaged as they are"
_NOT_DEEPSPEEDS = Ignored("DeepSpeed has no such section")
_DATA_PARALLEL = "GEM shards over data-parallel ranks only"
_REMOVED = "DeepSpeed no longer has it"
_QUANTIZED = "quantized weights do not show an update exactly"
_FP32_STATE = "GEM keeps fp32 masters and moments"
_NEEDED_ON = "GEM needs it on"
_NO_LOSS_SCALE = Ignored("bfloat16 needs no loss scaling")
_NO_CHECKPOINTS = Ignored("the trainer says how checkpoints are written")

_LOSS_SCALE: dict[str, Taken] = {
    "loss_scale": _NUMBER,
    "initial_scale_power": _SIZE,
    "loss_scale_window": _COUNT,
    "hysteresis": _SIZE,
    "consecutive_hysteresis": _SWITCH,
    "min_loss_scale": _COUNT,
    "auto_cast": _SWITCH,
}

_FILES: dict[str, Treatment] = {"enabled": _SWITCH, "output_path": _TEXT, "job_name": _TEXT}

#: What a checkpoint of DeepSpeed's holds; what a run writes here is whole anyway.
SAVING = (
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
)

#: Keys of ZeRO stage 3; DeepSpeed takes each without its prefix, too.
_STAGE3: dict[str, Taken] = {
    "stage3_prefetch_bucket_size": _SIZE,
    "stage3_param_persistence_threshold": _SIZE,
    "stage3_model_persistence_threshold": _SIZE,
    "stage3_max_live_parameters": _SIZE,
    "stage3_max_reuse_distance": _SIZE,
    SAVING[0]: _SWITCH,
    "stage3_module_granularity_threshold": _SIZE,
    "stage3_use_all_reduce_for_fetch_params": _SWITCH,
    "stage3_allgather_sequential": _SWITCH,
}

#: By section, what is done with each of its keys.
TABLE: dict[str, dict[str, Treatment]] = {
    "": {
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), _SETTLED),
        **dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping"), _SETTLED),
        **dict.fromkeys(("bf16", "fp16", "zero_optimization"), _SECTION),
        "optimizer": Ignored("--optimizer, --learning_rate and its neighbours decide"),
        "scheduler": Ignored("--lr_scheduler_type and --warmup_steps decide"),
        **dict.fromkeys(
            ("communication_data_type", "seq_parallel_communication_data_type"), _DTYPE
        ),
        **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state"), _SWITCH),
        **dict.fromkeys(("disable_allgather", "disable_python_gc"), _SWITCH),
        **dict.fromkeys(("timers", "comms_logger", "flops_profiler"), _SECTION),
        **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet", "aio"), _SECTION),
        "steps_per_print": _COUNT,
        "prescale_gradients": Ignored(_AVERAGED),
        "gradient_predivide_factor": Ignored(_AVERAGED, nothing=1),
        "log_level": _one_of("debug", "info", "warning", "error", "critical"),
        "vocabulary_size": _COUNT,
        "zero_allow_untested_optimizer": Ignored(_SETS_ITSELF, True),
        "zero_force_ds_cpu_optimizer": Ignored(_SETS_ITSELF),
        "activation_checkpointing": Ignored("pass --gradient_checkpointing to recompute them"),
        "compile": Ignored("the trainer runs the model without torch.compile"),
        "dataloader_drop_last": Ignored("every example is read"),
        **dict.fromkeys(("checkpoint", "checkpoint_tag_validation"), _NO_CHECKPOINTS),
        "datastates_ckpt": _NO_CHECKPOINTS,
        **dict.fromkeys(("comms_config", "monitor_config"), _NOT_DEEPSPEEDS),
        "bfloat16": Refused("call the section bf16"),
        "fp8": Refused("use --bf16 or --fp16"),
        **dict.fromkeys(("torch_autocast", "amp"), Refused("use --bf16 or --fp16")),
        "data_types": Refused("how gradients accumulate is the trainer's business"),
        "gradient_allreduce_op": Refused("the gradient is that of the mean loss", "mean"),
        "managed_gradient_accumulation": Refused(_NEEDED_ON, True),
        "tensor_parallel": Refused(_DATA_PARALLEL, {"autotp_size": 1}),
        **dict.fromkeys(("expert_parallel", "pipeline"), Refused(_DATA_PARALLEL)),
        **dict.fromkeys(("autotp_size", "sequence_parallel_size"), Refused(_DATA_PARALLEL, 1)),
        "sequence_parallel": Refused(_DATA_PARALLEL),
        "use_data_before_expert_parallelism": Refused(_DATA_PARALLEL),
        "curriculum_learning": Refused("the order of the data is the trainer's"),
        "data_efficiency": Refused("the order of the data is the trainer's"),
        "progressive_layer_drop": Refused("every target layer must run in every step"),
        "elasticity": Refused("resume a checkpoint on another number of ranks instead"),
        "hybrid_engine": Refused("it is for reinforcement learning"),
        "autotuning": Refused("it measures runs of its own instead of training"),
        "compression_training": Refused("it changes weights that GEM keeps"),
        **dict.fromkeys(("weight_quantization", "quantize_training"), Refused(_QUANTIZED)),
        **dict.fromkeys(("nebula", "eigenvalue", "sparse_attention"), Refused(_REMOVED)),
        **dict.fromkeys(("sparse_gradients", "graph_harvesting"), Refused(_REMOVED)),
    },
    "bf16": {
        "enabled": _SETTLED,
        "immediate_grad_update": _SWITCH,
        "check_grad_overflow": Refused(_NEEDED_ON, True),
        "bf16_master_weights_and_grads": Refused(_FP32_STATE),
        "bf16_optimizer_states": Refused(_FP32_STATE),
        **dict.fromkeys(_LOSS_SCALE, _NO_LOSS_SCALE),
    },
    "fp16": {
        "enabled": _SETTLED,
        **_LOSS_SCALE,
        "fp16_master_weights_and_grads": Refused(_FP32_STATE),
    },
    "zero_optimization": {
        "stage": _SETTLED,
        **dict.fromkeys(("contiguous_gradients", "reduce_scatter", "overlap_comm"), _SWITCH),
        **dict.fromkeys(("use_multi_rank_bucket_allreduce", "allgather_partitions"), _SWITCH),
        **dict.fromkeys(("load_from_fp32_weights", "elastic_checkpoint"), _SWITCH),
        **dict.fromkeys(("ignore_unused_parameters", "round_robin_gradients"), _SWITCH),
        **dict.fromkeys(("parameter_alignment", "memory_efficient_linear"), _SWITCH),
        **dict.fromkeys(("override_module_apply", "log_trace_cache_warnings"), _SWITCH),
        **dict.fromkeys(("enable_sanity_checks", "pipeline_loading_checkpoint"), _SWITCH),
        **dict.fromkeys(("cpu_offload", "cpu_offload_param"), _SWITCH),
        "cpu_offload_use_pin_memory": _SWITCH,
        SAVING[1]: _SWITCH,
        **dict.fromkeys(("offload_param", "offload_optimizer", "leaf_module"), _SECTION),
        "reduce_bucket_size": _COUNT,
        **dict.fromkeys(("allgather_bucket_size", "sub_group_size"), _SIZE),
        **_STAGE3,
        "save_muon_momentum_buffer_in_memory": Ignored(_SETS_ITSELF),
        "compute_grad_norm": Refused(_NEEDED_ON, True),
        "zero_hpz_partition_size": Refused(
            "hpZ keeps second copies of the weights that updates do not reach", 1
        ),
        "mics_shard_size": Refused(
            "MiCS partitions weights in a way that updates do not reach", -1
        ),
        "legacy_stage1": Refused(_REMOVED),
        "mics_hierarchical_params_gather": Refused(_REMOVED),
        "zeropp_loco_param": Refused(_REMOVED),
        "zero_quantized_weights": Refused(_QUANTIZED),
        "zero_quantized_nontrainable_weights": Refused(_QUANTIZED),
        "zero_quantized_gradients": Refused(
            "the gradient of the selected entries is sent as it is"
        ),
        "zenflow": Refused("it replaces the optimizer"),
    },
    "zero_optimization.offload_param": {
        "device": _one_of("none", "cpu", "nvme"),
        "pin_memory": _SWITCH,
        "max_in_cpu": _SIZE,
        "nvme_path": _TEXT,
        **dict.fromkeys(("buffer_count", "buffer_size"), _SIZE),
    },
    "zero_optimization.offload_optimizer": {
        "device": _one_of("none", "cpu", "nvme"),
        "pin_memory": _SWITCH,
        "cpuadam_cores_perc": _SHARE,
        "ratio": Refused("it needs an optimizer of DeepSpeed's", 1),
        "super_offload": Refused("it needs an optimizer of DeepSpeed's"),
        "nvme_path": _TEXT,
        "buffer_count": _SIZE,
        **dict.fromkeys(("buffer_size", "max_in_cpu"), Ignored("they are offload_param's")),
        **dict.fromkeys(("pipeline_read", "pipeline_write", "fast_init"), _SWITCH),
    },
    "zero_optimization.leaf_module": dict.fromkeys(("classes", "names", "name_suffixes"), _NAMES),
    "timers": {"throughput": _SECTION},
    "timers.throughput": {"enabled": _SWITCH, "synchronized": _SWITCH},
    "comms_logger": {
        **dict.fromkeys(("enabled", "verbose", "prof_all", "debug"), _SWITCH),
        "prof_ops": _NAMES,
    },
    "flops_profiler": {
        **dict.fromkeys(("enabled", "detailed"), _SWITCH),
        **dict.fromkeys(("profile_step", "top_modules"), _COUNT),
        "module_depth": Taken("a whole number of at least -1", lambda v: _is_whole(v, least=-1)),
        "recompute_fwd_factor": _NUMBER,
        "output_file": _TEXT,
    },
    "tensorboard": _FILES,
    "csv_monitor": _FILES,
    "wandb": {"enabled": _SWITCH, **dict.fromkeys(("group", "team", "project"), _TEXT)},
    "comet": {
        **dict.fromkeys(("enabled", "online"), _SWITCH),
        "samples_log_interval": _COUNT,
        **dict.fromkeys(("project", "workspace", "api_key", "experiment_name"), _TEXT),
        **dict.fromkeys(("experiment_key", "mode"), _TEXT),
    },
}
