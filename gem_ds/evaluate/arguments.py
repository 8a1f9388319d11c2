"""The flags that every evaluator shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser

from gem_ds.distributed.zero_config import read_config
from gem_ds.flags import HelpFormatter, name_of


def option(default: Any, text: str) -> Any:
    """A field with a default and its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class SamplingArguments:
    """The flags that all evaluators share."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the model."})
    delta: str | None = option(None, "delta.safetensors to apply to that model.")
    adapter: str | None = option(None, "Folder of a peft adapter to put into that model.")
    data_dir: str | None = option(
        None, "Folder of the task's files; without it the task is loaded from the Hub."
    )
    output_dir: str = field(metadata={"help": "Where samples and results are written."})
    overwrite_output_dir: bool = option(False, "Replace the evaluation that output_dir holds.")
    limit: int | None = option(None, "Evaluate the first so many problems only.")
    batch_size: int = option(32, "Samples per batch and rank; decides memory and speed.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Of the weights; auto is the delta's or a 16-bit adapter's, else the model's files'.",
    )
    backend: Literal["transformers", "vllm"] = option(
        "transformers",
        "What generates; vllm must be installed and takes no delta or adapter.",
    )
    deepspeed: str | None = option(
        None, "DeepSpeed JSON of ZeRO stage 3, for a model larger than one GPU."
    )
    local_rank: int = option(-1, "Set by the deepspeed launcher.")
    disable_tqdm: bool = option(False, "No progress bar.")


def parser_of(program: str, description: str, *flags: type) -> HfArgumentParser:
    """The parser of a program whose flags are the fields of these dataclasses."""
    return HfArgumentParser(
        flags,  # type: ignore[arg-type]
        prog=name_of(program.replace(".", " ")),
        description=description,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )


def check_arguments(arguments: SamplingArguments) -> None:
    """Refuse flags that can be seen to be wrong before ranks have met or a model is opened.

    Raises:
        ValueError: One sentence that names the flag.
    """
    for flag in ("limit", "batch_size"):
        count = getattr(arguments, flag)
        if count is not None and count < 1:
            raise ValueError(f"--{flag} must be at least 1, not {count}.")
    if Path(arguments.output_dir).exists() and not Path(arguments.output_dir).is_dir():
        raise ValueError(f"--output_dir {arguments.output_dir} is a file: choose another name.")
    if arguments.delta is not None and arguments.adapter is not None:
        raise ValueError("Pass --delta or --adapter, not both.")
    if arguments.deepspeed is not None:
        read_config(arguments.deepspeed)
        if arguments.adapter is not None:
            raise ValueError(
                "--adapter goes into a model that is whole on each rank: leave --deepspeed out."
            )
    if arguments.backend == "vllm":
        for flag, merge in (
            ("adapter", "merge it with peft"),
            ("delta", "write the model with launch/export.py"),
        ):
            if getattr(arguments, flag) is not None:
                raise ValueError(
                    f"--backend vllm takes no --{flag}: {merge} and pass the model's folder as "
                    "--model_name_or_path."
                )
        if arguments.deepspeed is not None or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                "--backend vllm spreads over the GPUs by itself: start it with plain python and "
                "without --deepspeed."
            )


@contextmanager
def sparing_memory(batch: str) -> Iterator[None]:
    """Turns running out of memory over a batch, which is described, into a ValueError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"The device's memory does not hold a batch of {batch}: lower --batch_size."
        ) from error
