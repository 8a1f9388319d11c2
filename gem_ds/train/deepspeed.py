"""The engine's configuration of a run: its DeepSpeed JSON beside its flags."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from gem_ds.distributed.zero_config import RunShape, resolve_config
from gem_ds.train.config import TrainArguments
from gem_ds.train.targets import Targets


def resolve_deepspeed(
    written: dict[str, Any],
    train: TrainArguments,
    config: PretrainedConfig,
    targets: Targets,
    world_size: int,
) -> dict[str, Any]:
    """The engine's configuration: the DeepSpeed JSON ``written`` with what the flags say."""
    shape = RunShape(
        world_size=world_size,
        micro_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        max_grad_norm=train.max_grad_norm,
        dtype=train.dtype,
        hidden_size=config.get_text_config().hidden_size,
        num_selected=targets.budget,
        blocks=targets.blocks,
        optimizer={
            "lr": (train.learning_rate, "--learning_rate"),
            "betas": ([train.adam_beta1, train.adam_beta2], "--adam_beta1 and --adam_beta2"),
            "eps": (train.adam_epsilon, "--adam_epsilon"),
            "weight_decay": (train.weight_decay, "--weight_decay"),
        },
        scheduler={
            "warmup_min_lr": (0, "a warmup"),
            "warmup_max_lr": (train.learning_rate, "--learning_rate"),
            "warmup_num_steps": (train.warmup_steps, "--warmup_steps"),
            "total_num_steps": (train.max_steps, "--max_steps"),
        },
    )
    return resolve_config(written, shape)
