"""Whether a setting fits, and the least change that makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from gem_ds.distributed.zero_config import zero_stage
from gem_ds.planning.forecast import Forecast, forecast, is_offloaded
from gem_ds.planning.subject import Setting

#: Share of the memory that the forecast leaves to what it does not count.
HEADROOM = 0.1

_ON_CPU = {"device": "cpu"}

#: What these files of the repository say to a forecast; an installed package is without them.
CONFIGS: dict[str, dict[str, Any]] = {
    **{
        f"ds_configs/zero{n}.json": {"zero_optimization": {"stage": n, "overlap_comm": n > 0}}
        for n in range(4)
    },
    "ds_configs/zero3_offload.json": {
        "zero_optimization": {"stage": 3, "offload_optimizer": _ON_CPU, "offload_param": _ON_CPU}
    },
}
_MOST_RANKS = 4096


def fits(found: Forecast, memory_bytes: float) -> bool:
    """Whether a rank with so much memory can run it, with some to spare."""
    return found.peak <= (1 - HEADROOM) * memory_bytes


def lower_stage(setting: Setting, memory_bytes: float) -> tuple[str, Forecast] | None:
    """The file of the lowest ZeRO stage that fits, below the setting's own, and what it needs.

    Each stage from 1 to 3 partitions more, and 3 sends the weights themselves, in every pass.
    """
    for stage in range(zero_stage(setting.deepspeed)):
        file = f"ds_configs/zero{stage}.json"
        with suppress(ValueError):  # fp16 begins at stage 1
            found = forecast(_with(setting, {"deepspeed": file}))
            if fits(found, memory_bytes):
                return file, found
    return None


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
    batch: dict[str, Any] = {}
    if (size := train.per_device_train_batch_size) > 1:
        batch["per_device_train_batch_size"] = 1
        batch["gradient_accumulation_steps"] = train.gradient_accumulation_steps * size
    if train.per_device_eval_batch_size > 1:
        batch["per_device_eval_batch_size"] = 1
    stage = zero_stage(deepspeed)
    offloads = stage == 3 and is_offloaded(deepspeed["zero_optimization"], "offload_param")
    sizes = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
    kept = {key: value for key, value in deepspeed.items() if key not in sizes}
    setting = replace(setting, deepspeed=kept)
    words: list[str] = []
    flags: dict[str, Any] = {}  # a later value takes the earlier's place
    for added, is_set in (
        ({"gradient_checkpointing": True}, train.gradient_checkpointing),
        (batch, not batch),
        *(
            ({"deepspeed": f"ds_configs/zero{higher}.json"}, stage >= higher)
            for higher in (1, 2, 3)
        ),
        ({"deepspeed": "ds_configs/zero3_offload.json"}, offloads),
    ):
        if not is_set:
            flags |= added
            words = [f"--{flag}" if v is True else f"--{flag} {v}" for flag, v in flags.items()]
            setting = _with(setting, added)
            yield words, setting
    while setting.world_size < _MOST_RANKS:
        setting = replace(setting, world_size=2 * setting.world_size)
        yield [*words, f"{setting.world_size} ranks"], setting


def _with(setting: Setting, flags: dict[str, Any]) -> Setting:
    if "deepspeed" in flags:
        return replace(setting, deepspeed=CONFIGS[flags["deepspeed"]])
    train = replace(setting.args.train, **flags)
    return replace(setting, args=replace(setting.args, train=train))
