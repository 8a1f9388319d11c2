"""The base model: its configuration, which costs nothing to read, and its weights."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.engine import partitioned_loading, whole_weights
from gem_ds.distributed.zero_config import zero_stage
from gem_ds.models.encoders import auto_class, head_names, initialise_head
from gem_ds.train.config import Arguments

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)

#: Neither encoders nor causal: they write, but transformers gives their whole input both ways.
_SEES_ANSWERS = ("cpmant", "xlnet")


def load_model_config(args: Arguments) -> PretrainedConfig:
    """The model's configuration, where its weights are there too.

    Raises:
        ValueError: as :func:`read_model_config`, or it lies in a folder without weights or with
            damaged ones.
    """
    name = str(args.model.model_name_or_path)
    config = read_model_config(args)
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _WEIGHT_FILES):
        raise ValueError(
            f"--model_name_or_path {name} holds no weights ({' or '.join(_WEIGHT_FILES)}): pass a "
            "complete model."
        )
    _refuse_damaged_weights(name)
    return config


def read_model_config(args: Arguments) -> PretrainedConfig:
    """The model's configuration, with or without weights.

    Raises:
        ValueError: it cannot be loaded, or is not of a model that GEM can train.
    """
    name = str(args.model.model_name_or_path)
    if name.startswith(("/", ".")) and not Path(name).is_dir():
        raise ValueError(f"--model_name_or_path {name} is no folder: check the path.")
    try:
        config = AutoConfig.from_pretrained(
            name,
            revision=args.model.revision or "main",
            trust_remote_code=args.model.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model_name_or_path {name} cannot be loaded: {one_line(error)}"
        ) from error
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model: pass a causal language model.")
    if config.model_type in _SEES_ANSWERS:
        raise ValueError(
            f"{name} is of type {config.model_type}, whose tokens see the answer that they are to "
            "learn: pass another causal language model."
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{name} is quantized, so its weights cannot hold an update exactly: pass the original."
        )
    return config


def _refuse_damaged_weights(name: str) -> None:
    """Open each weight file of a local folder, which reads its header and checks its length.

    While the weights load at ZeRO stage 3 the ranks wait for each other, so a file that is damaged
    on one node only has to be found before.
    """
    for path in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"The weights of {name} are damaged ({path.name}: {error}): copy them again."
            ) from error


def load_model(
    args: Arguments, config: PretrainedConfig, deepspeed: dict[str, Any], comm: Comm
) -> tuple[PreTrainedModel, list[str]]:
    """The base model in the run's dtype, partitioned while it loads at ZeRO stage 3.

    Parameters of an encoder's head that the files lack get their first values here.

    Args:
        args: the flags.
        config: as :func:`load_model_config` gives it, and :func:`models.encoders.set_head` leaves.
        deepspeed: the resolved DeepSpeed configuration.
        comm: the ranks; all call this together.

    Returns:
        The model, and the names of the parameters of its head.

    Raises:
        ValueError: its files lack a weight or have it in another shape.
        OSError: they cannot be read.
    """
    name = str(args.model.model_name_or_path)
    kwargs: dict[str, Any] = {"revision": args.model.revision or "main"}
    if args.model.attn_implementation:
        kwargs["attn_implementation"] = args.model.attn_implementation
    try:
        # At stage 3 loading is collective itself.
        together = comm.agreement() if zero_stage(deepspeed) < 3 else nullcontext()
        with together, partitioned_loading(deepspeed):
            loaded: Any = auto_class(config).from_pretrained(
                name,
                config=config,
                dtype=DTYPES[args.train.dtype],
                trust_remote_code=args.model.trust_remote_code,
                ignore_mismatched_sizes=True,  # they are refused below, in one sentence
                output_loading_info=True,
                **kwargs,
            )
            model, report = loaded
            missing = set(report["missing_keys"])
            head = head_names(model)
            new = sorted(missing & head)
            # Where another weight is missing, the model holds random numbers.
            wrong = [*missing.difference(new), *(key for key, *_ in report["mismatched_keys"])]
    except RuntimeError as error:  # at stage 3 rank 0 alone sees a wrong shape, after loading
        wrong = re.findall(r"size mismatch for (\S+):", str(error))
        if not wrong:
            raise
    with comm.agreement():
        if wrong:
            raise ValueError(
                f"{name} lacks {len(wrong)} of the weights that its config.json asks for, or has "
                f"them in another shape, for example {min(wrong)}: pass a complete model."
            )
    with whole_weights(model, new):
        initialise_head(model, new, getattr(config, "initializer_range", 0.02), args.train.seed)
    if args.train.gradient_checkpointing:
        enable_checkpointing(model)
    return model, sorted(head)


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Let the blocks of a model recompute their activations in the backward pass.

    Not reentrantly: a reentrant block runs a backward of its own (see :mod:`gem_ds.sparse.layers`).
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def one_line(error: Exception) -> str:
    """What a library says in several lines."""
    return " ".join(str(error).split())
