"""GEM sparse fine-tuning (arXiv 2508.16191) on DeepSpeed ZeRO."""

from gem_ds.files.delta import AppliedDelta, Delta, apply_delta
from gem_ds.files.mask import Mask
from gem_ds.select.selection import select_entries

__all__ = ["AppliedDelta", "Delta", "Mask", "apply_delta", "select_entries"]
