"""A delta as an adapter's folder, and back: the same entries in the files of two ecosystems.

A delta holds values in the dtype of the base, an adapter holds them in fp32 as they were trained;
merged into the base both give the same bits.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights
from safetensors.torch import save_file

from gem_ds.files.delta import Delta
from gem_ds.files.mask import Mask, WeightInfo
from gem_ds.tuner.config import GemConfig

_PREFIX, _ENTRIES = "base_model.model.", ".gem_entries."


def delta_to_adapter(delta: Delta, folder: str | Path, task_type: str = "CAUSAL_LM") -> None:
    """Write a delta as a folder that `PeftModel.from_pretrained` loads.

    Raises:
        ValueError: The delta has a head, which entries cannot hold, or entries of a parameter that
            is no module's ``weight``.
    """
    if delta.head:
        raise ValueError(
            "The delta has a task head, which an adapter's entries cannot hold: export the whole "
            "model."
        )
    mask, tensors, weights = delta.mask, {}, {}
    for name, info in mask.weights.items():
        module = name.removesuffix(".weight")
        if module == name:
            raise ValueError(f"{name} is no module's weight, so no adapter can hold its entries.")
        prefix = f"{_PREFIX}{module}{_ENTRIES}"
        tensors[f"{prefix}indices"] = mask.indices[name].contiguous()
        tensors[f"{prefix}values"] = delta.values[name].float().contiguous()
        weights[module] = asdict(info)
    config = GemConfig(
        target_modules=sorted(weights),
        base_weights=weights,
        num_entries={name.removesuffix(".weight"): len(v) for name, v in delta.values.items()},
        base_model_name_or_path=mask.base_model,
        revision=mask.revision,
        fingerprints=mask.fingerprints,
        method=mask.method,
        settings=mask.settings,
        task_type=task_type,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})


def adapter_to_delta(folder: str | Path) -> Delta:
    """Read an adapter's folder, or one of the Hub by its id, as a delta.

    Raises:
        ValueError: It is another method's, it lacks entries, or its base was quantized, so that the
            values are no weights of an unquantized one.
    """
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, GemConfig):
        raise ValueError(f"{folder} is an adapter of the method {config.peft_type}, not of GEM.")
    if config.base_quantization:
        raise ValueError(
            f"The base of {folder} was quantized, so its values are no weights of another base: "
            "load it with PeftModel and merge it."
        )
    tensors = load_peft_weights(str(folder), device="cpu")
    indices, values, weights = {}, {}, {}
    for module, described in config.base_weights.items():
        name, prefix = f"{module}.weight", f"{_PREFIX}{module}{_ENTRIES}"
        for part in ("indices", "values"):
            if prefix + part not in tensors:
                raise ValueError(f"{folder} has no {part} of {module}: it is incomplete.")
        weights[name] = info = WeightInfo(**{**described, "shape": tuple(described["shape"])})
        indices[name] = tensors[f"{prefix}indices"]
        values[name] = tensors[f"{prefix}values"].to(getattr(torch, info.dtype))
    mask = Mask(
        indices=indices,
        weights=weights,
        base_model=str(config.base_model_name_or_path),
        revision=config.revision,
        method=str(config.method),
        settings=config.settings,
        fingerprints=config.fingerprints,
    )
    return Delta(mask=mask, values=values)
