"""Whether a setting fits, and the least change that makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gem_ds.distributed.zero_config import read_config, zero_stage
from gem_ds.planning.forecast import Forecast, Setting, forecast, is_offloaded

#: Share of the memory that the forecast leaves to what it does not count.
HEADROOM = 0.1

_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
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
    flags: dict[str, str] = {}  # a later value takes the earlier's place
    kept = {key: value for key, value in setting.deepspeed.items() if key not in _BATCH_SIZES}
    setting = replace(setting, deepspeed=kept)
    for change in (_checkpoint, _cut_batch, _partition, _offload):
        changed = change(setting)
        if changed is not None:
            changed_flags, setting = changed
            flags |= changed_flags
            yield _words(flags), setting
    while setting.world_size < _MOST_RANKS:
        setting = replace(setting, world_size=2 * setting.world_size)
        yield [*_words(flags), f"{setting.world_size} ranks"], setting


def _words(flags: dict[str, str]) -> list[str]:
    return [f"{flag} {value}".strip() for flag, value in flags.items()]


_Change = tuple[dict[str, str], Setting]  # flags with their values, the setting then


def _checkpoint(setting: Setting) -> _Change | None:
    if setting.args.train.gradient_checkpointing:
        return None
    return {"--gradient_checkpointing": ""}, _with(setting, gradient_checkpointing=True)


def _cut_batch(setting: Setting) -> _Change | None:
    train = setting.args.train
    cut = {}
    if (size := train.per_device_train_batch_size) > 1:
        cut["per_device_train_batch_size"] = 1
        cut["gradient_accumulation_steps"] = train.gradient_accumulation_steps * size
    if train.per_device_eval_batch_size > 1:
        cut["per_device_eval_batch_size"] = 1
    if not cut:
        return None
    return {f"--{name}": f"{value}" for name, value in cut.items()}, _with(setting, **cut)


def _partition(setting: Setting) -> _Change | None:
    if zero_stage(dict(setting.deepspeed)) == 3:
        return None
    return _on(setting, "zero3.json")


def _offload(setting: Setting) -> _Change | None:
    if is_offloaded(setting.deepspeed["zero_optimization"], "offload_param"):
        return None
    return _on(setting, "zero3_offload.json")


def _with(setting: Setting, **train: object) -> Setting:
    args = setting.args
    return replace(setting, args=replace(args, train=replace(args.train, **train)))


def _on(setting: Setting, config: str) -> _Change:
    changed = replace(setting, deepspeed=read_config(_CONFIGS / config))
    return {"--deepspeed": f"ds_configs/{config}"}, changed
