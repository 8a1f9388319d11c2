"""The trainings that are measured: a model of a known shape, and the flags of each contender."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gem_ds.distributed.zero_config import read_config
from gem_ds.models.load import DTYPES

from .shapes import SHAPES, adapter_size, write_data, write_model

#: By name the method that the trainer is told.
CONTENDERS = {
    **dict.fromkeys(("floor", "gem", "tuner"), "gem"),
    **dict.fromkeys(("lora", "lora_default", "lora_leaves"), "lora"),
    "shira": "shira",
    "dense_masked": "gem",
    "full": "full",
}
NEED_WHOLE_WEIGHTS = ("shira", "dense_masked")  # which stage 3 cuts
_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


@dataclass(frozen=True, kw_only=True)
class Training:
    """What all contenders have in common."""

    shape: str = "opt-125m"  # a name of :data:`steps.shapes.SHAPES`
    layers: int | None = None  # of the model; None for the shape's own
    world_size: int = 1
    stage: int = 0  # of ZeRO
    dtype: str = "fp32"  # or bf16
    batch_size: int = 4  # sequences of a rank
    tokens: int = 256  # of a sequence
    batches: int = 1  # of data, all of which serve a calibration
    density: float = 0.001  # trained entries, of all of the model's
    gradient_checkpointing: bool = False
    sddmm_kernel: str = "auto"
    max_live_parameters: int | None = None  # gathered ahead at ZeRO 3; None: DeepSpeed's own limit
    makes_weights: bool = False  # each process draws its weights instead of loading them

    def flags(self, contenders: Sequence[str], folder: Path) -> dict[str, list[str]]:
        """Write model and data into a folder; returns each contender's flags, but its output."""
        config = SHAPES[self.shape](self.layers)
        has_weights = not self.makes_weights
        write_model(folder / "model", config, DTYPES[self.dtype], has_weights=has_weights)
        num_rows = self.batches * self.world_size * self.batch_size
        write_data(folder / "train.jsonl", num_rows, self.tokens)
        common = {
            "model_name_or_path": folder / "model",
            "task": "jsonl",
            "train_file": folder / "train.jsonl",
            "prompt_field": "prompt",
            "target_field": "target",
            "max_length": self.tokens,
            "per_device_train_batch_size": self.batch_size,
            "max_steps": 10**6,
            "learning_rate": "1e-5",
            "lr_scheduler_type": "constant",
            "sddmm_kernel": self.sddmm_kernel,
            "deepspeed": self._write_deepspeed(folder / "deepspeed.json"),
        }
        switches = ["--disable_tqdm"]
        switches += ["--bf16"] if self.dtype == "bf16" else []
        switches += ["--gradient_checkpointing"] if self.gradient_checkpointing else []
        rank, density_of_rank = adapter_size(config, self.density)
        flags = {}
        for name in contenders:
            method = CONTENDERS[name]
            density = density_of_rank if name == "shira" else self.density
            values = common | {"method": method, "lora_r": rank, "density": density}
            flags[name] = [
                str(word) for key, value in values.items() for word in (f"--{key}", value)
            ]
            flags[name] += switches
        return flags

    def _write_deepspeed(self, path: Path) -> Path:
        config = read_config(_CONFIGS / f"zero{self.stage}.json")
        if self.max_live_parameters is not None:
            config["zero_optimization"]["stage3_max_live_parameters"] = self.max_live_parameters
        path.write_text(json.dumps(config))
        return path
