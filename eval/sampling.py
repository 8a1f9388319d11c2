"""Sampling: prompts -> samples.jsonl, which scoring reads; what every evaluator shares.

    samples = sample_all(arguments, prompts, settings, num_samples=n)

A run that was interrupted continues when it is started again with the same flags.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from eval.generation import GenerationSettings, generate, load_model
from eval.samples import SAMPLES_FILE, Prompt, Sample, SampleLog


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class SamplingArguments:
    """The flags that all evaluators share."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the model."})
    delta: str | None = _option(None, "delta.safetensors to apply to that model.")
    data_dir: str | None = _option(None, "Folder of the task's files (default: from the Hub).")
    output_dir: str = field(metadata={"help": "Where samples and results are written."})
    overwrite_output_dir: bool = _option(False, "Replace the evaluation that output_dir holds.")
    limit: int | None = _option(None, "Evaluate the first so many problems only.")
    batch_size: int = _option(32, "Samples per batch and rank; decides memory and speed.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "Of the weights; auto is the delta's, or without one that of the model's files."
    )
    backend: Literal["transformers", "vllm"] = _option(
        "transformers", "What generates; vllm must be installed."
    )
    deepspeed: str | None = _option(
        None, "DeepSpeed JSON of ZeRO stage 3, for a model larger than one GPU."
    )
    local_rank: int = _option(-1, "Set by the deepspeed launcher.")


def is_main_process() -> bool:
    """Whether this is the one process that prints; known before ranks have met."""
    return int(os.environ.get("RANK", 0)) == 0


def sample_all(
    arguments: SamplingArguments,
    prompts: Mapping[str, Prompt],
    settings: GenerationSettings,
    *,
    num_samples: int = 1,
) -> list[Sample] | None:
    """Sample every prompt `num_samples` times; write or continue output_dir/samples.jsonl.

    Args:
        arguments: The shared flags; `limit` is the caller's to apply.
        prompts: Task id to prompt.
        settings: How completions are made.
        num_samples: Samples of each prompt.

    Returns:
        The samples, by task in the order of `prompts` and then by number; None on every rank but
        the first, which has nothing left to do.

    Raises:
        ValueError: Flags, the model, the delta, a prompt, or the samples that output_dir holds are
            at fault.
        OSError: A file cannot be read or written.
    """
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / SAMPLES_FILE
    log = SampleLog(path, prompts, num_samples, asdict(settings))
    model, tokenizer = load_model(
        arguments.model_name_or_path,
        delta_path=arguments.delta,
        dtype=arguments.dtype,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    keys = [key for key in log.keys if key not in log.samples]
    completions = generate(
        model,
        tokenizer,
        [prompts[task] for task, _ in keys],
        settings,
        batch_size=arguments.batch_size,
    )
    log.append(
        Sample(
            task_id=task,
            sample=number,
            prompt=prompts[task],
            completion=completion.text,
            finish_reason=completion.finish_reason,
            num_tokens=completion.num_tokens,
            settings=asdict(settings),
        )
        for (task, number), completion in zip(keys, completions, strict=True)
    )
    return log.finish()
