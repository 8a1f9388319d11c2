"""Adapters of other methods (LoRA and its kin), which peft has written and loads.

The adapter's layers stand in the model beside its own and are not merged into them, so that its
weights and its rounding are those of its training. peft is imported when an adapter is asked for.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from gem_ds.files.mask import dtype_name

_CONFIG = "adapter_config.json"


def check_adapter(folder: str) -> None:
    """Refuse what can be seen to be no adapter.

    Raises:
        ValueError: The folder holds none, or peft is not installed.
    """
    if not Path(folder, _CONFIG).is_file():
        raise ValueError(f"--adapter {folder} holds no {_CONFIG}: pass the folder of an adapter.")
    _import_peft()


def adapted_names(folder: str) -> set[str]:
    """Names of the model's own parameters that the adapter replaces: a head, mostly.

    Raises:
        ValueError: Its weights cannot be read.
    """
    return {name.removeprefix("base_model.model.") for name in _weights(folder)}


def half_precision(folder: str) -> str | None:
    """The torch name of the 16-bit dtype that the adapter was trained and saved in; None for fp32.

    One in fp32 may have been trained beside a model of 16 bits: so peft does it by default.

    Raises:
        ValueError: Its weights cannot be read.
    """
    dtypes = {weight.dtype for weight in _weights(folder).values() if weight.is_floating_point()}
    half = dtypes & {torch.bfloat16, torch.float16}
    return dtype_name(half.pop()) if len(dtypes) == len(half) == 1 else None


def _weights(folder: str) -> dict[str, Tensor]:
    try:
        return _import_peft().load_peft_weights(folder, device="cpu")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unusable(folder, error) from error


def add_adapter(model: PreTrainedModel, folder: str) -> None:
    """Put an adapter into a model, in place.

    Raises:
        ValueError: It does not fit the model, or is no part of its layers (a learnt prompt).
    """
    peft = _import_peft()
    is_raised = half_precision(folder) is None  # to fp32, as in training
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of libraries, to each other
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapted: Any = peft.PeftModel.from_pretrained(
                model, folder, autocast_adapter_dtype=is_raised
            )
    except (OSError, ValueError, RuntimeError, KeyError, UserWarning, SafetensorError) as error:
        raise _unusable(folder, error) from error
    if adapted.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"--adapter {folder} is a learnt prompt and no part of the layers, which is not "
            "evaluated here: pass another kind of adapter."
        )
    model.eval()


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("--adapter needs peft: install it (pip install peft).") from error
    return peft


def _unusable(folder: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300]
    return ValueError(f"--adapter {folder} does not fit the model: {reason}")
