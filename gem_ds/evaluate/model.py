"""The model that is evaluated: the flags that name it, where it lies, what tells it from others."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from gem_ds.data.tasks import TaskData
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.watchdog import DEFAULT_SECONDS, watching
from gem_ds.distributed.zero_config import inference_config, read_config
from gem_ds.files.checkpoint import OPTIMIZER_FILE
from gem_ds.files.digests import digest_of_file
from gem_ds.flags import option, refuse_below_one
from gem_ds.models.adapters import refuse_own_adapter
from gem_ds.models.blocks import block_sizes, model_of
from gem_ds.models.load import ModelFiles, load_partitioned, load_weights, open_model

_MODEL_SUFFIXES = {".safetensors", ".bin", ".json", ".model", ".txt", ".jinja"}
_BLOCK = 1 << 20
_NUM_BLOCKS = 64


@dataclass(frozen=True, kw_only=True)
class SamplingArguments:
    """The flags that all evaluators share."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the model."})
    delta: str | None = option(
        None, "delta.safetensors, or a checkpoint-N folder, to apply to that model."
    )
    adapter: str | None = option(None, "Folder of a peft adapter to put into that model.")
    trust_remote_code: bool = option(False, "Run model code that comes with the weights.")
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
        "What generates; vllm must be installed and takes no adapter.",
    )
    deepspeed: str | None = option(
        None, "DeepSpeed JSON of ZeRO stage 3, for a model larger than one GPU."
    )
    local_rank: int = option(-1, "Set by the deepspeed launcher.")
    watchdog_seconds: float = option(
        DEFAULT_SECONDS,
        "Several ranks: end all when a process of theirs is stopped, dead or cut off for so long; "
        "0 waits for it.",
    )
    disable_tqdm: bool = option(False, "No progress bar.")


def check_arguments(arguments: SamplingArguments) -> None:
    """Refuse flags that can be seen to be wrong before ranks have met or a model is opened."""
    refuse_below_one(limit=arguments.limit, batch_size=arguments.batch_size)
    if not arguments.watchdog_seconds >= 0:
        seconds = arguments.watchdog_seconds
        raise ValueError(f"--watchdog_seconds must be at least 0, not {seconds:g}.")
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
        if arguments.adapter is not None:
            raise ValueError(
                "--backend vllm takes no --adapter: merge it with peft and pass the model's folder "
                "as --model_name_or_path."
            )
        if arguments.deepspeed is not None or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                "--backend vllm spreads over the GPUs by itself: start it with plain python and "
                "without --deepspeed."
            )


@contextmanager
def joined_ranks(arguments: SamplingArguments) -> Iterator[Comm]:
    """The ranks that a launcher has started; without a launcher and --deepspeed just this one."""
    if "RANK" not in os.environ and arguments.deepspeed is None:
        yield Comm(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    from gem_ds.distributed import process_group  # takes longer than a small evaluation

    comm = process_group.init_distributed()
    try:
        with warnings.catch_warnings():  # DeepSpeed calls what torch has renamed
            warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
            with watching(comm, arguments.watchdog_seconds):
                yield comm
    finally:
        process_group.leave_distributed()


def open_files(
    arguments: SamplingArguments, task: TaskData | None = None
) -> tuple[ModelFiles, dict[str, Any] | None]:
    """The model but for its weights, and the configuration that partitions it, if one does."""
    files = open_model(
        arguments.model_name_or_path,
        delta_path=arguments.delta,
        adapter=arguments.adapter,
        dtype=arguments.dtype,
        task=task,
        trust_remote_code=arguments.trust_remote_code,
    )
    if files.adapter is not None:
        import gem_ds.tuner  # noqa: F401 - by which peft knows GEM's adapters
    if files.adapter is not None and arguments.adapter is None:
        if arguments.deepspeed is not None or arguments.backend == "vllm":
            refuse_own_adapter(files.name, files.revision)
        if os.environ.get("RANK", "0") == "0":
            print(f"{files.name} holds an adapter beside the model, which is put in")
    if arguments.deepspeed is None:
        return files, None
    config, text_config = read_config(arguments.deepspeed), files.config.get_text_config()
    model = model_of(files.config, trust_remote_code=files.trust_remote_code)
    return files, inference_config(
        config,
        dtype=files.dtype,
        hidden_size=text_config.hidden_size,
        blocks=block_sizes(model),
    )


def load_model(files: ModelFiles, deepspeed: dict[str, Any] | None, comm: Comm) -> PreTrainedModel:
    """The model, whole on this rank or partitioned over all; raises as `load_weights`."""
    if deepspeed is not None:
        with comm.in_unison():
            return load_partitioned(files, deepspeed, comm)
    with comm.agreement():
        return load_weights(files, comm.device)


def model_facts(arguments: SamplingArguments, files: ModelFiles) -> dict[str, object]:
    """What is evaluated: the model, and the hash of what is put onto it."""
    delta, adapter = arguments.delta, files.adapter
    if delta is not None and Path(delta).is_dir():
        delta = str(Path(delta, OPTIMIZER_FILE))  # which has the digests of a checkpoint's others
    parts = [] if adapter is None else sorted(Path(adapter).glob("adapter_*"))
    return {
        "model": files.name,
        "model_fingerprint": model_fingerprint(files.name, files.config),
        "delta_sha256": None if delta is None else digest_of_file(delta),
        "adapter_sha256": None if adapter is None else {p.name: digest_of_file(p) for p in parts},
    }


def model_fingerprint(name: str, config: PretrainedConfig) -> str:
    """What tells a model from another that bears its name.

    On the Hub that is the commit, in a folder a hash of its weights, configuration and tokenizer:
    of a file above 64 MiB the size and 64 evenly spaced blocks of 1 MiB, which takes a second.
    """
    folder = Path(name)
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None))
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in _MODEL_SUFFIXES or path.name[0] == "." or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _BLOCK * _NUM_BLOCKS:
                digest.update(file.read())
                continue
            for i in range(_NUM_BLOCKS):
                file.seek((size - _BLOCK) * i // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]
