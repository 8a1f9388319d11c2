"""The model that is evaluated, with its delta or adapter, whole on this rank or partitioned.

What can be refused without weights is refused first: `open_model` reads the delta, the
configuration and the tokenizer; only then `load_weights` reads the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gem_ds.data.tasks import TaskData
from gem_ds.evaluate.adapter import adapted_names, add_adapter, check_adapter, half_precision
from gem_ds.files.delta import Delta, apply_delta
from gem_ds.files.mask import dtype_name
from gem_ds.models.encoders import auto_class, is_encoder, set_head
from gem_ds.models.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model that is known but for its weights.

    Attributes:
        name: Folder or Hub name of the (base) model.
        revision: Its revision on the Hub.
        dtype: Of the weights to be; "auto" where the files decide when they are loaded.
        config: The model's configuration.
        tokenizer: The model's tokenizer.
        delta: What is to be applied, if anything.
        adapter: Folder of the peft adapter that is put into it, if any.
        auto_class: The class of transformers that loads it.
    """

    name: str
    revision: str
    dtype: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    delta: Delta | None
    adapter: str | None = None
    auto_class: Any = AutoModelForCausalLM

    @property
    def text_config(self) -> Any:
        """The part of the configuration that speaks of the language model."""
        return self.config.get_text_config()


def open_model(
    name: str,
    *,
    delta_path: str | None = None,
    adapter: str | None = None,
    dtype: str = "auto",
    task: TaskData | None = None,
) -> ModelFiles:
    """Read everything but the weights.

    Args:
        name: Folder or Hub name of the (base) model.
        delta_path: delta.safetensors of a run on that model.
        adapter: Folder of a peft adapter of that model.
        dtype: "float32", "bfloat16", "float16", or "auto": that of the delta or of an adapter of 16
            bits, without one that of the model's files.
        task: What the model classifies; None for a causal model that generates.

    Raises:
        ValueError: The model or its tokenizer cannot be read or is not there, the delta is invalid
            or of another dtype, there is no such adapter, or an encoder should write.
        FileNotFoundError: There is no such delta.
    """
    delta = None if delta_path is None else Delta.load(delta_path)
    if adapter is not None:
        check_adapter(adapter)
        dtype = (half_precision(adapter) or dtype) if dtype == "auto" else dtype
    if delta is not None:
        dtype = _delta_dtype(delta, dtype)
    # A revision is meaningful in the repository that it was recorded for only.
    recorded = delta is not None and delta.mask.base_model == name
    revision = (delta.mask.revision if delta is not None and recorded else None) or "main"
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        tokenizer = load_tokenizer(name, revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unloadable(name, error) from error
    if tokenizer is None:
        raise ValueError(
            f"--model_name_or_path {name} holds no tokenizer: save the model's tokenizer there."
        )
    if dtype == "auto" and config.dtype is not None:
        dtype = dtype_name(config.dtype)
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
        auto_class=auto_class(config),
    )


def load_weights(files: ModelFiles, device: torch.device) -> PreTrainedModel:
    """The whole model on one device, delta or adapter applied, in eval mode.

    Raises:
        ValueError: The weights cannot be loaded or are not whole, the delta is of another base, or
            the adapter does not fit.
    """
    model = _from_pretrained(files)
    if files.delta is not None:
        apply_delta(model, files.delta)
    if files.adapter is not None:
        add_adapter(model, files.adapter)
    placed: Any = model  # the checker takes `to` for a method of its wrapper
    return placed.to(device)


def load_partitioned(files: ModelFiles, deepspeed: Mapping[str, Any]) -> PreTrainedModel:
    """The model in ZeRO-3 partitions over the ranks, all of which are in this call.

    Args:
        files: What to load.
        deepspeed: As `gem_ds.distributed.zero_config.inference_config` gives it.

    Raises:
        ValueError: As `load_weights`, on all ranks alike.
    """
    from gem_ds.distributed import engine as zero

    with zero.partitioned_loading(dict(deepspeed)):
        model = _from_pretrained(files)
    if files.delta is not None:
        for part in _by_weight(files.delta):
            with zero.whole_weights(model, [*part.values, *part.head]):
                apply_delta(model, part)
    zero.prepare_inference(model, dict(deepspeed))
    return model


def _from_pretrained(files: ModelFiles) -> PreTrainedModel:
    try:
        loaded: Any = files.auto_class.from_pretrained(
            files.name,
            config=files.config,
            revision=files.revision,
            dtype=files.dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unloadable(files.name, error) from error
    model, report = loaded
    brought = set(files.delta.head) if files.delta is not None else set()
    if files.adapter is not None and report["missing_keys"]:
        brought |= adapted_names(files.adapter)
    if missing := set(report["missing_keys"]) - brought:
        raise ValueError(
            f"--model_name_or_path {files.name} lacks {len(missing)} weights of a "
            f"{type(model).__name__}, for example {min(missing)!r}: pass a complete model."
        )
    return model


def _by_weight(delta: Delta) -> Iterator[Delta]:
    """The delta in parts of one weight each, so that one weight at a time need be whole."""
    for i, name in enumerate(delta.values):
        mask = replace(
            delta.mask,
            indices={name: delta.mask.indices[name]},
            weights={name: delta.mask.weights[name]},
        )
        head = {} if i else delta.head
        yield Delta(mask=mask, values={name: delta.values[name]}, head=head)


def _unloadable(name: str, error: Exception) -> ValueError:
    reason = str(error).strip().partition("\n")[0]
    return ValueError(f"--model_name_or_path {name} cannot be loaded: {reason}")


def _delta_dtype(delta: Delta, dtype: str) -> str:
    """The dtype in which a model can take the delta."""
    name = dtype_name(delta.dtype)
    if dtype not in ("auto", name):
        raise ValueError(
            f"--dtype {dtype} cannot hold the delta, whose values are {name}: leave --dtype out."
        )
    return name
