"""An adapter that was trained on a quantized base, as a delta of an unquantized one.

With ``q`` the dequantized weights that the training saw, ``v`` the trained values and ``b`` the
base that is to hold them, the entries become ``b + (v - q)``. There are two such bases:

    the model that was quantized    as its files have it; what the training has changed is added to
                                    weights which differ from those it saw by what was rounded off
    the dequantized model           ``b`` is ``q``: the trained model itself, but for rounding
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from peft import PeftModel
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from gem_ds.files.apply import apply_delta
from gem_ds.files.delta import Delta
from gem_ds.files.fingerprint import fingerprints
from gem_ds.files.mask import WeightInfo
from gem_ds.models.export import load_base
from gem_ds.models.folder import base_folder, write_folder
from gem_ds.tuner.convert import adapter_config, entries_of
from gem_ds.tuner.layer import GemLayer


def on_unquantized_base(
    folder: str,
    base: str | None = None,
    *,
    dequantize: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Delta, PreTrainedModel]:
    """An adapter of a quantized base as a delta of an unquantized one, and that base.

    The model that was quantized, ``base`` (default: the one it names), is quantized anew, to know
    ``q``. With ``dequantize`` the delta is one of the dequantized model. A ValueError says why that
    cannot be, or why the adapter is none of this base.
    """
    config = adapter_config(folder)
    if not config.base_quantization:
        raise ValueError(f"The base of {folder} was not quantized: export it without --dequantize.")
    delta = entries_of(config, folder)
    base = base or delta.mask.base_model
    load = partial(load_base, base, delta, trust_remote_code=trust_remote_code)
    quantized = load(quantization_config=_quantized_by(config.base_quantization))
    changes = _trained_changes(quantized, folder)
    other = quantized.dequantize() if dequantize else load()
    return _laid_on(delta, changes, other), other


def prepare_dequantized(
    folder: str, base: str | None = None, *, trust_remote_code: bool = False
) -> tuple[Delta, Callable[[Path], list[str]]]:
    """What fills a folder with the dequantized model and an adapter's values in it."""
    delta, model = on_unquantized_base(
        folder, base, dequantize=True, trust_remote_code=trust_remote_code
    )
    apply_delta(model, delta)
    base = base or delta.mask.base_model
    files = base_folder(base, delta.mask.revision_of(base))
    trained = dict(model.named_parameters())
    return delta, lambda target: write_folder(target, files, model, trained, delta.head)


def _quantized_by(recorded: Mapping[str, str]) -> BitsAndBytesConfig:
    if recorded["quant_method"] != "bitsandbytes":
        raise ValueError(
            f"The base was quantized by {recorded['quant_method']}: only adapters of bases that "
            "bitsandbytes has quantized can be exported."
        )
    in_8_bits = recorded["load_in_8bit"] == "True"
    return BitsAndBytesConfig(
        load_in_8bit=in_8_bits,
        load_in_4bit=not in_8_bits,
        bnb_4bit_quant_type=recorded["bnb_4bit_quant_type"],
        bnb_4bit_use_double_quant=recorded["bnb_4bit_use_double_quant"] == "True",
    )


def _trained_changes(model: PreTrainedModel, folder: str) -> dict[str, Tensor]:
    """Per weight ``v - q`` at an adapter's entries, fp32 [k]; the model is left without it."""
    adapted = PeftModel.from_pretrained(model, folder)
    changes = {}
    for name, layer in model.named_modules():
        if isinstance(layer, GemLayer):
            for weight, entries in layer.entries_of("default").items():
                before = layer.weights[weight].values(entries.indices).float()
                changes[f"{name}.{weight}"] = (entries.values.detach() - before).cpu()
    adapted.unload()
    return changes


def _laid_on(delta: Delta, changes: Mapping[str, Tensor], base: PreTrainedModel) -> Delta:
    """The delta of a base whose entries become its own values ``b`` plus the changes."""
    values, weights = {}, {}
    for name, index in delta.mask.indices.items():
        parameter = base.get_parameter(name).detach()
        before = parameter.reshape(-1)[index.to(parameter.device).long()].cpu()
        values[name] = (before.float() + changes[name]).to(before.dtype)
        weights[name] = WeightInfo.of(parameter.shape, before)
    found = fingerprints(dict(base.named_parameters()))
    mask = replace(delta.mask, weights=weights, fingerprints=found)
    return Delta(mask=mask, values=values, head=delta.head)
