"""Loading a model to train or to evaluate it: what costs nothing to read first, then its weights.

    trainable_config -> load_for_training            the base model
    open_model -> load_weights, or load_partitioned over the ranks         with delta or adapter

DeepSpeed is imported where a model is partitioned: it takes longer than a small evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gem_ds.data.tasks import TaskData
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.zero_config import zero_stage
from gem_ds.files.apply import apply_delta
from gem_ds.files.checkpoint import load_delta
from gem_ds.files.delta import Delta
from gem_ds.files.fingerprint import fingerprints
from gem_ds.files.mask import dtype_name
from gem_ds.models.adapters import (
    adapted_names,
    half_precision,
    put_adapter,
    refuse_own_adapter,
    settle_adapter,
)
from gem_ds.models.encoders import auto_class, head_names, initialise_head, is_encoder, set_head
from gem_ds.models.tokenizer import load_tokenizer
from gem_ds.models.weight_files import refuse_damaged_files, refuse_float8

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Words of the RuntimeErrors of torch and transformers for which the files are at fault. Any other
#: is the machine's or the program's, such as a rank that was lost.
_OF_THE_FILES = (
    *("loading state_dict", "weight conversion", "conversion of the weights"),
    *("PytorchStreamReader", "corrupt"),
)

_DEQUANTIZE = (
    "load it once with quantization_config=Mxfp4Config(dequantize=True) and dtype=torch.bfloat16, "
    "save_pretrained it, and pass that folder"
)

#: Neither encoders nor causal: they write, but transformers gives their whole input both ways.
_SEES_ANSWERS = ("cpmant", "xlnet")


def trainable_config(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The configuration of a model that GEM can train, with or without weights."""
    if name.startswith(("/", ".")) and not Path(name).is_dir():
        raise ValueError(f"--model_name_or_path {name} is no folder: check the path.")
    refuse_own_adapter(name, revision)
    config = model_config(name, revision, trust_remote_code=trust_remote_code)
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model: pass a causal language model.")
    if config.model_type in _SEES_ANSWERS:
        raise ValueError(
            f"{name} is of type {config.model_type}, whose tokens see the answer that they are to "
            "learn: pass another causal language model."
        )
    if quantization := getattr(config, "quantization_config", None):
        is_only = dict(quantization).get("quant_method") == "mxfp4"  # gpt-oss, of which is no other
        remedy = _DEQUANTIZE if is_only else "pass the original"
        raise ValueError(
            f"{name} is quantized, so its weights cannot hold an update exactly: {remedy}."
        )
    return config


def load_for_training(
    name: str,
    config: PretrainedConfig,
    deepspeed: dict[str, Any],
    comm: Comm,
    *,
    dtype: torch.dtype,
    seed: int,
    **options: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """The base model, and its head's parameters' names.

    Weights go from the files to this rank's device one by one, at ZeRO stage 3 straight into
    partitions; the host holds none of them whole besides. All ranks call this together. Parameters
    of an encoder's head that the files lack get their first values here. `options` are those of
    `from_pretrained`.
    """
    from gem_ds.distributed.weights import partitioned_loading, whole_weights

    together: AbstractContextManager[Any] = nullcontext()
    if zero_stage(deepspeed) < 3:  # else loading is collective, and rank 0 alone sees a wrong shape
        options["device_map"] = {"": comm.device}
        together = comm.agreement()
    with together, partitioned_loading(deepspeed):
        model, missing, wrong = _from_pretrained(name, config, dtype=dtype, **options)
        head = sorted(head_names(model)) if model is not None else []
        new = sorted(missing.intersection(head))
    with comm.agreement():
        _refuse_incomplete(name, [*missing.difference(new), *wrong])
    assert model is not None, "an incomplete one is refused"
    with whole_weights(model, new):
        initialise_head(model, new, getattr(config, "initializer_range", 0.02), seed)
    return model, head


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model that is to be evaluated, known but for its weights."""

    name: str  # folder or Hub name
    revision: str
    dtype: str  # "auto" where the files decide when they are loaded
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    delta: Delta | None
    adapter: str | None = None
    trust_remote_code: bool = False


def open_model(
    name: str,
    *,
    delta_path: str | None = None,
    adapter: str | None = None,
    dtype: str = "auto",
    task: TaskData | None = None,
    trust_remote_code: bool = False,
) -> ModelFiles:
    """Read everything but the weights of a base model and the delta or adapter on it.

    An adapter that lies in the model's folder is taken, as if it were named, if nothing else is. A
    `dtype` of "auto" is that of the delta or of an adapter of 16 bits, without one that of the
    model's files. Without a `task` to classify the model must write.
    """
    delta = None if delta_path is None else load_delta(delta_path)
    revision = "main" if delta is None else delta.mask.revision_of(name)
    adapter = settle_adapter(name, revision, adapter, has_delta=delta is not None)
    if adapter is not None and dtype == "auto":
        dtype = half_precision(adapter) or dtype
    if delta is not None:
        own = dtype_name(delta.dtype)
        if dtype not in ("auto", own):
            raise ValueError(
                f"--dtype {dtype} cannot hold the delta, whose values are {own}: leave --dtype out."
            )
        dtype = own
    config = model_config(name, revision, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(name, revision, trust_remote_code=trust_remote_code)
    refuse_damaged_files(name)
    if dtype == "auto":
        refuse_float8(name)
        dtype = dtype_name(config.dtype) if isinstance(config.dtype, torch.dtype) else dtype
    if task is not None:
        set_head(config, name, task)
    elif is_encoder(config):
        raise ValueError(
            f"--model_name_or_path {name} is an encoder ({config.model_type}), which does not "
            "write: pass a causal language model."
        )
    return ModelFiles(
        name=name,
        revision=revision,
        dtype=dtype,
        config=config,
        tokenizer=tokenizer,
        delta=delta,
        adapter=adapter,
        trust_remote_code=trust_remote_code,
    )


def load_weights(files: ModelFiles, device: torch.device) -> PreTrainedModel:
    """The whole model on one device, delta or adapter applied, in eval mode."""
    model = _load_base(files, device_map={"": device})
    if files.delta is not None:
        apply_delta(model, files.delta)
    if files.adapter is not None:
        put_adapter(model, files.adapter)
    placed: Any = model  # the checker takes `to` for a method of its wrapper
    return placed.to(device)  # type: ignore[no-any-return]


def load_partitioned(
    files: ModelFiles, deepspeed: Mapping[str, Any], comm: Comm
) -> PreTrainedModel:
    """As `load_weights`, without an adapter, in ZeRO-3 partitions over the ranks; all call it."""
    from gem_ds.distributed.engine import prepare_inference
    from gem_ds.distributed.weights import Weights, partitioned_loading, whole_weights

    with partitioned_loading(dict(deepspeed)):
        model = _load_base(files)
    if files.delta is not None:
        found = fingerprints(dict(model.named_parameters()), Weights(comm, stage=3).read_entries)
        files.delta.mask.check_rest(found, "delta")
        for part in files.delta.by_weight():
            with whole_weights(model, [*part.values, *part.head]):
                apply_delta(model, part)
    prepare_inference(model, dict(deepspeed))
    return model


def _load_base(files: ModelFiles, **options: Any) -> PreTrainedModel:
    """The base model; what it lacks, the delta or the adapter must bring."""
    brought = set() if files.delta is None else set(files.delta.head)
    if files.adapter is not None:  # is ours to put in; transformers would do that with one beside
        options["adapter_kwargs"] = {"subfolder": "no_adapter"}
        brought |= adapted_names(files.adapter)
    return complete_model(
        files.name,
        files.config,
        brought,
        dtype=files.dtype,
        revision=files.revision,
        trust_remote_code=files.trust_remote_code,
        **options,
    )


def complete_model(
    name: str, config: PretrainedConfig, brought: Collection[str], **options: Any
) -> PreTrainedModel:
    """As `_from_pretrained`; refuses a model whose files lack more than is brought to it."""
    model, missing, wrong = _from_pretrained(name, config, **options)
    _refuse_incomplete(name, [*missing.difference(brought), *wrong])
    assert model is not None, "an incomplete one is refused"
    return model


def model_config(
    name: str, revision: str | None, *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The configuration of a model of any kind; a ValueError says why it cannot be read."""
    try:  # where it is not told whether to trust, transformers asks at the terminal
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise _unloadable(name, error) from error
    return config


def _from_pretrained(
    name: str, config: PretrainedConfig, *, model_class: Any = None, **options: Any
) -> tuple[PreTrainedModel | None, set[str], list[str]]:
    """The model, which weights its files lack, and which have another shape (perhaps without it).

    What they lack is random. Options of ``from_pretrained`` that are None are left out.
    """
    try:
        model, report = (model_class or auto_class(config)).from_pretrained(
            name,
            config=config,
            ignore_mismatched_sizes=True,  # their names are returned
            output_loading_info=True,
            **{option: value for option, value in options.items() if value is not None},
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if wrong := re.findall(r"size mismatch for (\S+):", str(error)):
            return None, set(), wrong
        if isinstance(error, RuntimeError) and not any(w in str(error) for w in _OF_THE_FILES):
            raise
        raise _unloadable(name, error) from error
    return model, set(report["missing_keys"]), [key for key, *_ in report["mismatched_keys"]]


def _refuse_incomplete(name: str, wrong: list[str]) -> None:
    if wrong:
        raise ValueError(
            f"--model_name_or_path {name} lacks {len(wrong)} of the weights that its config.json "
            f"asks for, or has them in another shape, for example {min(wrong)}: pass a complete "
            "model."
        )


def _unloadable(name: str, error: Exception) -> ValueError:
    reason = str(error).strip().partition("\n")[0]
    if "trust_remote_code" in str(error):
        reason = "its files hold code that would have to run: pass --trust_remote_code to allow it."
    return ValueError(f"--model_name_or_path {name} cannot be loaded: {reason}")
