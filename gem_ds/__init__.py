"""GEM sparse fine-tuning (arXiv 2508.16191) on DeepSpeed ZeRO."""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # not from typing: the sandbox's processes import this too and stay lean
if TYPE_CHECKING:
    from gem_ds.calibration.select_mask import select_mask as select_mask
    from gem_ds.deltas.merge import merge_deltas as merge_deltas
    from gem_ds.files.apply import AppliedDelta as AppliedDelta
    from gem_ds.files.apply import apply_delta as apply_delta
    from gem_ds.files.delta import Delta as Delta
    from gem_ds.files.mask import Mask as Mask
    from gem_ds.pruning.ebft import fit_blocks as fit_blocks
    from gem_ds.pruning.prune import prune as prune
    from gem_ds.select.selection import select_entries as select_entries
    from gem_ds.serving.delta_set import DeltaSet as DeltaSet
    from gem_ds.serving.messages import DeltaReceiver as DeltaReceiver
    from gem_ds.serving.sync import DeltaSender as DeltaSender
    from gem_ds.serving.sync import DeltaTransfer as DeltaTransfer
    from gem_ds.serving.vllm_engine import VllmDeltas as VllmDeltas
    from gem_ds.train.main import RunResult as RunResult
    from gem_ds.train.main import finetune as finetune
    from gem_ds.tuner import GemConfig as GemConfig
    from gem_ds.tuner import select_mask_with as select_mask_with

_MODULES = {
    "AppliedDelta": "gem_ds.files.apply",
    "Delta": "gem_ds.files.delta",
    "DeltaReceiver": "gem_ds.serving.messages",
    "DeltaSender": "gem_ds.serving.sync",
    "DeltaSet": "gem_ds.serving.delta_set",
    "DeltaTransfer": "gem_ds.serving.sync",
    "GemConfig": "gem_ds.tuner",
    "Mask": "gem_ds.files.mask",
    "RunResult": "gem_ds.train.main",
    "VllmDeltas": "gem_ds.serving.vllm_engine",
    "apply_delta": "gem_ds.files.apply",
    "finetune": "gem_ds.train.main",
    "fit_blocks": "gem_ds.pruning.ebft",
    "merge_deltas": "gem_ds.deltas.merge",
    "prune": "gem_ds.pruning.prune",
    "select_entries": "gem_ds.select.selection",
    "select_mask": "gem_ds.calibration.select_mask",
    "select_mask_with": "gem_ds.tuner",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
