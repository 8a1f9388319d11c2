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
_DATA_PARALLEL = "GEM shards over data-parallel ranks only"
_REMOVED = "DeepSpeed no longer has it"
_QUANTIZED = "quantized weights do not show an update exactly"
_FP32_STATE = "GEM keeps fp32 masters and moments"
_NEEDED_ON = "GEM needs it on"


def _keys(*lines: tuple[Treatment, str]) -> dict[str, Treatment]:
    """By key what is done with it, from what is done with several."""
    return {key: treatment for treatment, keys in lines for key in keys.split()}


#: What a checkpoint of DeepSpeed's holds; what a run writes here is whole anyway.
SAVING = (
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
)

_LOSS_SCALE = _keys(
    (_NUMBER, "loss_scale"),
    (_SIZE, "initial_scale_power hysteresis"),
    (_COUNT, "loss_scale_window min_loss_scale"),
    (_SWITCH, "consecutive_hysteresis auto_cast"),
)

_FILES = _keys((_SWITCH, "enabled"), (_TEXT, "output_path job_name"))

#: By section, what is done with each of its keys. DeepSpeed takes those of ZeRO stage 3 without
#: their prefix, too.
TABLE: dict[str, dict[str, Treatment]] = {
    "": _keys(
        (_SETTLED, "train_batch_size train_micro_batch_size_per_gpu"),
        (_SETTLED, "gradient_accumulation_steps gradient_clipping"),
        (_SECTION, "bf16 fp16 zero_optimization timers comms_logger flops_profiler"),
        (_SECTION, "tensorboard wandb csv_monitor comet aio"),
        (_DTYPE, "communication_data_type seq_parallel_communication_data_type"),
        (_SWITCH, "wall_clock_breakdown memory_breakdown dump_state"),
        (_SWITCH, "disable_allgather disable_python_gc"),
        (_COUNT, "steps_per_print vocabulary_size"),
        (_one_of("debug", "info", "warning", "error", "critical"), "log_level"),
        (Ignored("--optimizer, --learning_rate and its neighbours decide"), "optimizer"),
        (Ignored("--lr_scheduler_type and --warmup_steps decide"), "scheduler"),
        (Ignored(_AVERAGED), "prescale_gradients"),
        (Ignored(_AVERAGED, nothing=1), "gradient_predivide_factor"),
        (Ignored(_SETS_ITSELF, nothing=True), "zero_allow_untested_optimizer"),
        (Ignored(_SETS_ITSELF), "zero_force_ds_cpu_optimizer"),
        (
            Ignored("pass --gradient_checkpointing to recompute them"),
            "activation_checkpointing",
        ),
        (Ignored("the trainer runs the model without torch.compile"), "compile"),
        (Ignored("every example is read"), "dataloader_drop_last"),
        (
            Ignored("the trainer says how checkpoints are written"),
            "checkpoint checkpoint_tag_validation datastates_ckpt",
        ),
        (Ignored("DeepSpeed has no such section"), "comms_config monitor_config"),
        (Refused("call the section bf16"), "bfloat16"),
        (Refused("use --bf16 or --fp16"), "fp8 torch_autocast amp"),
        (Refused("how gradients accumulate is the trainer's business"), "data_types"),
        (Refused("the gradient is that of the mean loss", "mean"), "gradient_allreduce_op"),
        (Refused(_NEEDED_ON, nothing=True), "managed_gradient_accumulation"),
        (Refused(_DATA_PARALLEL, nothing={"autotp_size": 1}), "tensor_parallel"),
        (Refused(_DATA_PARALLEL, nothing=1), "autotp_size sequence_parallel_size"),
        (Refused(_DATA_PARALLEL), "expert_parallel pipeline sequence_parallel"),
        (Refused(_DATA_PARALLEL), "use_data_before_expert_parallelism"),
        (Refused("the order of the data is the trainer's"), "curriculum_learning data_efficiency"),
        (Refused("every target layer must run in every step"), "progressive_layer_drop"),
        (Refused("resume a checkpoint on another number of ranks instead"), "elasticity"),
        (Refused("it is for reinforcement learning"), "hybrid_engine"),
        (Refused("it measures runs of its own instead of training"), "autotuning"),
        (Refused("it changes weights that GEM keeps"), "compression_training"),
        (Refused(_QUANTIZED), "weight_quantization quantize_training"),
        (Refused(_REMOVED), "nebula eigenvalue sparse_attention"),
        (Refused(_REMOVED), "sparse_gradients graph_harvesting"),
    ),
    "bf16": _keys(
        (_SETTLED, "enabled"),
        (_SWITCH, "immediate_grad_update"),
        (Refused(_NEEDED_ON, nothing=True), "check_grad_overflow"),
        (Refused(_FP32_STATE), "bf16_master_weights_and_grads bf16_optimizer_states"),
        (Ignored("bfloat16 needs no loss scaling"), " ".join(_LOSS_SCALE)),
    ),
    "fp16": _LOSS_SCALE
    | _keys((_SETTLED, "enabled"), (Refused(_FP32_STATE), "fp16_master_weights_and_grads")),
    "zero_optimization": _keys(
        (_SETTLED, "stage"),
        (_SWITCH, "contiguous_gradients reduce_scatter overlap_comm allgather_partitions"),
        (_SWITCH, "use_multi_rank_bucket_allreduce load_from_fp32_weights elastic_checkpoint"),
        (_SWITCH, "ignore_unused_parameters round_robin_gradients parameter_alignment"),
        (_SWITCH, "memory_efficient_linear override_module_apply log_trace_cache_warnings"),
        (_SWITCH, "enable_sanity_checks pipeline_loading_checkpoint"),
        (_SWITCH, "cpu_offload cpu_offload_param cpu_offload_use_pin_memory"),
        (_SECTION, "offload_param offload_optimizer leaf_module"),
        (_COUNT, "reduce_bucket_size"),
        (_SIZE, "allgather_bucket_size sub_group_size"),
        (_SIZE, "stage3_prefetch_bucket_size stage3_param_persistence_threshold"),
        (_SIZE, "stage3_model_persistence_threshold stage3_max_live_parameters"),
        (_SIZE, "stage3_max_reuse_distance stage3_module_granularity_threshold"),
        (_SWITCH, "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential"),
        (_SWITCH, " ".join(SAVING)),
        (Ignored(_SETS_ITSELF), "save_muon_momentum_buffer_in_memory"),
        (Refused(_NEEDED_ON, nothing=True), "compute_grad_norm"),
        (
            Refused("hpZ keeps second copies of the weights that updates do not reach", nothing=1),
            "zero_hpz_partition_size",
        ),
        (
            Refused("MiCS partitions weights in a way that updates do not reach", nothing=-1),
            "mics_shard_size",
        ),
        (Refused(_REMOVED), "legacy_stage1 mics_hierarchical_params_gather zeropp_loco_param"),
        (Refused(_QUANTIZED), "zero_quantized_weights zero_quantized_nontrainable_weights"),
        (
            Refused("the gradient of the selected entries is sent as it is"),
            "zero_quantized_gradients",
        ),
        (Refused("it replaces the optimizer"), "zenflow"),
    ),
    "zero_optimization.offload_param": _keys(
        (_one_of("none", "cpu", "nvme"), "device"),
        (_SWITCH, "pin_memory"),
        (_SIZE, "max_in_cpu buffer_count buffer_size"),
        (_TEXT, "nvme_path"),
    ),
    "zero_optimization.offload_optimizer": _keys(
        (_one_of("none", "cpu", "nvme"), "device"),
        (_SWITCH, "pin_memory pipeline_read pipeline_write fast_init"),
        (_SHARE, "cpuadam_cores_perc"),
        (Refused("it needs an optimizer of DeepSpeed's", nothing=1), "ratio"),
        (Refused("it needs an optimizer of DeepSpeed's"), "super_offload"),
        (_TEXT, "nvme_path"),
        (_SIZE, "buffer_count"),
        (Ignored("they are offload_param's"), "buffer_size max_in_cpu"),
    ),
    "zero_optimization.leaf_module": _keys((_NAMES, "classes names name_suffixes")),
    "timers": _keys((_SECTION, "throughput")),
    "timers.throughput": _keys((_SWITCH, "enabled synchronized")),
    "comms_logger": _keys((_SWITCH, "enabled verbose prof_all debug"), (_NAMES, "prof_ops")),
    "flops_profiler": _keys(
        (_SWITCH, "enabled detailed"),
        (_COUNT, "profile_step top_modules"),
        (Taken("a whole number of at least -1", lambda v: _is_whole(v, -1)), "module_depth"),
        (_NUMBER, "recompute_fwd_factor"),
        (_TEXT, "output_file"),
    ),
    "tensorboard": _FILES,
    "csv_monitor": _FILES,
    "wandb": _keys((_SWITCH, "enabled"), (_TEXT, "group team project")),
    "comet": _keys(
        (_SWITCH, "enabled online"),
        (_COUNT, "samples_log_interval"),
        (_TEXT, "project workspace api_key experiment_name experiment_key mode"),
    ),
}
