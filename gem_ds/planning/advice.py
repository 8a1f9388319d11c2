"""Whether a setting fits, and the least change that makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gem_ds.distributed.zero_config import zero_stage
from gem_ds.planning.forecast import Forecast, Setting, forecast, is_offloaded

#: Share of the memory that the forecast leaves to what it does not count.
HEADROOM = 0.1

_ON_CPU = {"device": "cpu"}

#: What these files of the repository say to a forecast; an installed package is without them.
CONFIGS: dict[str, dict[str, Any]] = {
    "ds_configs/zero3.json": {"zero_optimization": {"stage": 3}},
    "ds_configs/zero3_offload.json": {
        "zero_optimization": {"stage": 3, "offload_optimizer": _ON_CPU, "offload_param": _ON_CPU}
    },
}
_MOST_RANKS = 4096
_BATCH_SIZES = (
    *("train_batch_size", "train_micro_batch_size_per_gpu"),
    "gradient_accumulation_steps",
)


def fits(found: Forecast, memory_bytes: float) -> bool:
    """Whether a rank with so much memory can run it, with some to spare."""
    return found.peak <= (1 - HEADROOM) * memory_bytes


def least_change(setting: Setting, memory_bytes: float) -> tuple[list[str], Forecast] | None:
    """The first of :func:`changes` that fits: what to change, and what is needed then."""
    for told, changed in changes(setting):
        found = forecast(changed)
        if fits(found, memory_bytes):
            return told, found
    return None


def changes(setting: Setting) -> Iterator[tuple[list[str], Setting]]:
    """Changes that need less memory, one upon the other, those that cost least time first.

    The batch of a step stays the same until ranks are added. Batch sizes that the DeepSpeed JSON
    spells out are taken to follow the flags.
    """
    train, deepspeed = setting.args.train, setting.deepspeed
    batch = {}
    if (size := train.per_device_train_batch_size) > 1:
        batch["per_device_train_batch_size"] = "1"
        batch["gradient_accumulation_steps"] = f"{train.gradient_accumulation_steps * size}"
    if train.per_device_eval_batch_size > 1:
        batch["per_device_eval_batch_size"] = "1"
    partitions = zero_stage(deepspeed) == 3
    offloads = partitions and is_offloaded(deepspeed["zero_optimization"], "offload_param")
    kept = {key: value for key, value in deepspeed.items() if key not in _BATCH_SIZES}
    setting = replace(setting, deepspeed=kept)
    flags: dict[str, str] = {}  # a later value takes the earlier's place
    for added, is_set in (
        ({"gradient_checkpointing": ""}, train.gradient_checkpointing),
        (batch, not batch),
        ({"deepspeed": "ds_configs/zero3.json"}, partitions),
        ({"deepspeed": "ds_configs/zero3_offload.json"}, offloads),
    ):
        if not is_set:
            flags |= added
            setting = _with(setting, added)
            yield _words(flags), setting
    while setting.world_size < _MOST_RANKS:
        setting = replace(setting, world_size=2 * setting.world_size)
        yield [*_words(flags), f"{setting.world_size} ranks"], setting


def _words(flags: dict[str, str]) -> list[str]:
    return [f"--{flag} {value}".strip() for flag, value in flags.items()]


def _with(setting: Setting, flags: dict[str, str]) -> Setting:
    if "deepspeed" in flags:
        return replace(setting, deepspeed=CONFIGS[flags["deepspeed"]])
    values: dict[str, Any] = {name: int(value) if value else True for name, value in flags.items()}
    args = setting.args
    return replace(setting, args=replace(args, train=replace(args.train, **values)))
