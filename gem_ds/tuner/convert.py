"""A delta as an adapter's folder, and back: the same entries in the files of two ecosystems.

    delta.safetensors                   adapter's folder
    <module>.weight.indices, .values    <module>.gem_entries.indices, .values
    <experts>.<projection>.indices, ... <experts>.gem_entries.<projection>.indices, ...
    head.<name>                         <name>, of modules_to_save
    metadata                            adapter_config.json

A delta holds values in the dtype of the base, an adapter holds them in fp32 as they were trained.
Merged into the base both give the same bits: what a delta rounds off, no forward pass has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors.torch import save_file

from gem_ds.files.delta import Delta
from gem_ds.sparse.experts import PROJECTIONS
from gem_ds.tuner.config import WRAPPED, GemConfig, key_of, read_entries, target_of


def delta_to_adapter(delta: Delta, folder: str | Path, task_type: str | None = None) -> None:
    """Write a delta as a folder that `PeftModel.from_pretrained` loads.

    Args:
        delta: Any.
        folder: Where ``adapter_config.json`` and ``adapter_model.safetensors`` are written.
        task_type: As peft has them; by it a `PeftModel` gets the methods of its class (default:
            ``CAUSAL_LM``, and none where the delta has a task head).

    Raises:
        ValueError: The delta has entries of a parameter that is no module's ``weight`` and no
            projection of experts.
    """
    mask, tensors, weights = delta.mask, {}, {}
    for name, info in mask.weights.items():
        if not name.endswith(".weight") and name.rpartition(".")[2] not in PROJECTIONS:
            raise ValueError(f"{name} is no module's weight, so no adapter can hold its entries.")
        key = f"{WRAPPED}{key_of(name)}"
        tensors[f"{key}.indices"] = mask.indices[name].contiguous()
        tensors[f"{key}.values"] = delta.values[name].float().contiguous()
        weights[target_of(name)] = asdict(info)
    for name, parameter in delta.head.items():
        tensors[f"{WRAPPED}{name}"] = parameter.contiguous()
    config = GemConfig(
        target_modules=sorted(weights),
        modules_to_save=sorted({name.rpartition(".")[0] for name in delta.head}) or None,
        base_weights=weights,
        num_entries={target_of(name): len(v) for name, v in delta.values.items()},
        base_model_name_or_path=mask.base_model,
        revision=mask.revision,
        fingerprints=mask.fingerprints,
        method=mask.method,
        settings=mask.settings,
        task_type=task_type or (None if delta.head else "CAUSAL_LM"),
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})


def prepare_adapter(
    delta: Delta, base: str, *, trust_remote_code: bool = False
) -> Callable[[Path], list[str]]:
    """What fills a folder that peft loads as an adapter; of the base nothing is read."""

    def write(folder: Path) -> list[str]:
        delta_to_adapter(delta, folder)
        return ["import gem_ds.tuner before peft loads it"]

    return write


def adapter_to_delta(folder: str | Path) -> Delta:
    """Read an adapter's folder, or one of the Hub by its id, as a delta.

    Raises:
        ValueError: It is another method's, it is incomplete or damaged, or its base was quantized,
            so that the values are no weights of an unquantized one.
    """
    config = adapter_config(folder)
    if config.base_quantization:
        raise ValueError(
            f"The base of {folder} was quantized, so its values are no weights of another base: "
            "gem-ds import and gem-ds export find those."
        )
    return entries_of(config, folder)


def entries_of(config: GemConfig, folder: str | Path) -> Delta:
    """What an adapter holds, as a delta of the base that it was trained on, quantized or not."""
    mask, values, head = read_entries(config, str(folder))
    values = {name: v.to(getattr(torch, mask.weights[name].dtype)) for name, v in values.items()}
    return Delta(mask=mask, values=values, head=head)


def adapter_config(folder: str | Path) -> GemConfig:
    """The configuration of a saved adapter; a ValueError for one of another method."""
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, GemConfig):
        raise ValueError(f"{folder} is an adapter of the method {config.peft_type}, not of GEM.")
    return config
