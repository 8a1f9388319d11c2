"""Masks in any training loop: a tuner of peft that trains the selected entries of frozen weights.

Importing it registers the method, so that ``get_peft_model``, ``Trainer``, TRL's trainers and
``PeftModel.from_pretrained`` know it.
"""

from gem_ds.tuner.config import GemConfig
from gem_ds.tuner.convert import adapter_to_delta, delta_to_adapter
from gem_ds.tuner.layer import GemLayer
from gem_ds.tuner.model import GemModel
from gem_ds.tuner.trainer import select_mask_with

__all__ = [
    "GemConfig",
    "GemLayer",
    "GemModel",
    "adapter_to_delta",
    "delta_to_adapter",
    "select_mask_with",
]
