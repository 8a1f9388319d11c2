"""Adapters of the library peft: LoRA, IA3 and SHiRA to train, and any kind to evaluate.

An adapter's layers stand in the model beside its own and are not merged into them, so that its
weights and its rounding are those of its training. peft is imported when an adapter is asked for.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file
from transformers.utils.hub import has_file

from gem_ds.files.mask import dtype_name
from gem_ds.models.blocks import stop_input_gradients

_CONFIG = "adapter_config.json"


def add_adapter(
    model: PreTrainedModel,
    method: str,
    targets: Sequence[str],
    head: Sequence[str],
    *,
    seed: int,
    rank: int,
    lora_alpha: float,
    lora_dropout: float,
) -> Any:
    """Put a new adapter on a model; all but it and the head, which is trained whole, is frozen.

    LoRA and SHiRA have the `rank` and change the layers of the weights `targets`; SHiRA trains
    about K entries. IA3 scales what peft's own table names for the architecture, unless there are
    targets.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it warns
    import peft

    torch.manual_seed(seed)
    options: dict[str, Any] = {"target_modules": [name.removesuffix(".weight") for name in targets]}
    if method == "lora":
        options |= {"r": rank, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    elif method == "shira":
        options["r"] = rank
    else:
        options = options | {"feedforward_modules": []} if targets else {}
    head_modules = sorted({name.rpartition(".")[0] for name in head})
    kind = {"lora": "LoraConfig", "shira": "ShiraConfig", "ia3": "IA3Config"}[method]
    config = getattr(peft, kind)(modules_to_save=head_modules or None, **options)
    try:
        # In the model's dtype: the optimizer keeps fp32 masters of what DeepSpeed trains, and its
        # stage 3 takes no two dtypes.
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        if method != "ia3":
            raise
        raise ValueError(
            f"peft does not know where IA3 belongs in a {model.config.model_type} model: name the "
            "layers with --target_modules."
        ) from error
    stop_input_gradients(model)  # which peft has let run
    for key, value in vars(config).items():
        if isinstance(value, set):  # which peft would write in another order in each run
            setattr(config, key, sorted(value))
    return adapted


def is_of_head(name: str, head: Sequence[str]) -> bool:
    """Whether a parameter, perhaps renamed by peft, is the head's."""
    return name in head or ".modules_to_save." in name


def own_adapter(name: str, revision: str | None = None) -> str | None:
    """The base of the adapter that lies with a model, which transformers would load by itself.

    A ValueError where there is no model, only an adapter.
    """
    path = None
    with suppress(OSError, ValueError):  # of the name of nothing, which the configuration's tells
        path = find_adapter_config_file(name, revision=revision or "main")
    if path is None:
        return None
    try:
        base = str(json.loads(Path(path).read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError, RecursionError):
        base = "a model that it does not name"
    if not has_file(name, "config.json", revision=revision or "main"):
        raise ValueError(
            f"--model_name_or_path {name} holds no model, only an adapter of peft for {base}: pass "
            f"that model, and to evaluate the adapter with it, --adapter {name}."
        )
    return base


def refuse_own_adapter(name: str, revision: str | None = None) -> None:
    """Refuse a model with an adapter beside it; a ValueError says what to do."""
    if own_adapter(name, revision) is not None:
        raise ValueError(
            f"--model_name_or_path {name} holds an adapter ({_CONFIG}) beside the model, which "
            "transformers would put in by itself: merge it with peft, or move adapter_config.json "
            "and adapter_model.* to a folder of their own."
        )


def settle_adapter(name: str, revision: str, adapter: str | None, *, has_delta: bool) -> str | None:
    """The adapter to put into a model; one beside the model only where nothing else is."""
    if own_adapter(name, revision) is not None:
        is_named = adapter is not None and Path(adapter).resolve() != Path(name).resolve()
        if is_named or has_delta or not Path(name).is_dir():
            refuse_own_adapter(name, revision)
        return name
    if adapter is not None and not Path(adapter, _CONFIG).is_file():
        raise ValueError(f"--adapter {adapter} holds no {_CONFIG}: pass the folder of an adapter.")
    return adapter


def adapted_names(folder: str) -> set[str]:
    """Names of the model's own parameters that the adapter replaces: a head, mostly."""
    return {name.removeprefix("base_model.model.") for name in _weights(folder)}


def half_precision(folder: str) -> str | None:
    """The torch name of the 16-bit dtype that the adapter was trained and saved in; None for fp32.

    One in fp32 may have been trained beside a model of 16 bits: so peft does it by default.
    """
    dtypes = {weight.dtype for weight in _weights(folder).values() if weight.is_floating_point()}
    half = dtypes & {torch.bfloat16, torch.float16}
    return dtype_name(half.pop()) if len(dtypes) == len(half) == 1 else None


def put_adapter(model: PreTrainedModel, folder: str) -> None:
    """Put a trained adapter into a model, in place; a learnt prompt, no part of it, is refused."""
    import peft

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
    model.train(False)


def _weights(folder: str) -> dict[str, Tensor]:
    import peft

    try:
        return peft.load_peft_weights(folder, device="cpu")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unusable(folder, error) from error


def _unusable(folder: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300]
    return ValueError(f"--adapter {folder} does not fit the model: {reason}")
