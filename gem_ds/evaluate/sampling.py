"""Sampling: prompts -> samples.jsonl, which scoring reads.

    samples = sample_all(arguments, prompts, settings, num_samples=n)

A run that was interrupted continues when it is started again with the same flags, and the file is
the same, byte for byte, as if it had not been. Under `torchrun` or `deepspeed` the
ranks share the batches, and rank 0 writes the file, again the same one. (All of this where the
device's kernels are deterministic, at one batch size; `evaluate.generation` says what rounding can
change.)

    round:   rank 0   rank 1   rank 2        after each round the completions are gathered,
             batch 0  batch 1  batch 2       rank 0 appends them to the file,
             batch 3  batch 4  (batch 3)     and no rank goes on before the others

With `--deepspeed` (ZeRO-3, for a model larger than one GPU) all ranks must take part in every
forward pass: one that has no batch left repeats another's, and its answers are dropped.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.zero_config import inference_config, read_config
from gem_ds.evaluate.arguments import SamplingArguments, check_arguments
from gem_ds.evaluate.decoding import Transformers
from gem_ds.evaluate.generation import (
    Backend,
    Completion,
    GenerationSettings,
    Key,
    Prompt,
    Request,
    make_requests,
)
from gem_ds.evaluate.provenance import model_facts
from gem_ds.evaluate.samples import SAMPLES_FILE, Sample, SampleLog
from gem_ds.models.load import ModelFiles, load_partitioned, load_weights, open_model
from gem_ds.progress import Progress

RESULTS_FILE = "results.json"
VERDICTS_FILE = "verdicts.jsonl"


def sample_all(
    arguments: SamplingArguments,
    prompts: Mapping[str, Prompt],
    settings: GenerationSettings,
    *,
    num_samples: int = 1,
) -> list[Sample] | None:
    """Sample every prompt `num_samples` times; write or continue output_dir/samples.jsonl.

    Earlier results and verdicts are deleted before the file changes, so that none lie beside
    samples that they were not counted on.

    `arguments.limit` is the caller's to apply.

    Returns:
        The samples, by task in the order of `prompts` and then by number; None on every rank but
        the first, which has nothing left to do.

    Raises:
        ValueError: Flags, the model, the delta, a prompt, or the samples that output_dir holds are
            at fault.
        OSError: A file cannot be read or written.
        PeerError: Another rank tells what went wrong.
    """
    check_arguments(arguments)
    with joined_ranks(arguments) as comm:
        with comm.agreement():
            plan = _plan(arguments, prompts, settings, num_samples, is_main=comm.is_main)
        done = comm.broadcast_object(set(plan.log.samples))
        if len(done) < len(plan.requests):
            _sample_pending(arguments, plan, _backend(arguments, plan, settings, comm), done, comm)
        return plan.log.finish() if comm.is_main else None


@contextmanager
def joined_ranks(arguments: SamplingArguments) -> Iterator[Comm]:
    """The ranks that a launcher has started; without a launcher and --deepspeed just this one."""
    if "RANK" not in os.environ and arguments.deepspeed is None:
        yield Comm(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    # Here, as DeepSpeed takes longer to import than a small evaluation.
    from gem_ds.distributed import process_group

    comm = process_group.init_distributed()
    try:
        with warnings.catch_warnings():  # DeepSpeed calls what torch has renamed
            warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
            yield comm
    finally:
        process_group.leave_distributed()


def deepspeed_config(arguments: SamplingArguments, files: ModelFiles) -> dict[str, Any] | None:
    """The configuration of --deepspeed for this model; None where each rank has it whole."""
    if arguments.deepspeed is None:
        return None
    return inference_config(
        read_config(arguments.deepspeed),
        dtype=files.dtype,
        hidden_size=files.config.get_text_config().hidden_size,
    )


def load_model(files: ModelFiles, deepspeed: dict[str, Any] | None, comm: Comm) -> PreTrainedModel:
    """The model, whole on this rank or partitioned over all; raises as `load_weights`."""
    if deepspeed is not None:
        with comm.in_unison():
            return load_partitioned(files, deepspeed)
    with comm.agreement():
        return load_weights(files, comm.device)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is known before any weight is loaded."""

    files: ModelFiles
    requests: list[Request]
    log: SampleLog
    deepspeed: dict[str, Any] | None


def _plan(
    arguments: SamplingArguments,
    prompts: Mapping[str, Prompt],
    settings: GenerationSettings,
    num_samples: int,
    *,
    is_main: bool,
) -> _Plan:
    """Reads all but the weights; refuses what can be refused by then. Only rank 0 has a file."""
    files = open_model(
        arguments.model_name_or_path,
        delta_path=arguments.delta,
        adapter=arguments.adapter,
        dtype=arguments.dtype,
    )
    deepspeed = deepspeed_config(arguments, files)
    described = {  # all that decides a sample beside its prompt and its number
        **model_facts(files.name, files.config, arguments.delta, arguments.adapter),
        "dtype": files.dtype,
        "backend": arguments.backend,
        **asdict(settings),
    }
    path = Path(arguments.output_dir, SAMPLES_FILE) if is_main else None
    overwrite = arguments.overwrite_output_dir
    log = SampleLog(path, prompts, num_samples, described, overwrite=overwrite)
    requests = make_requests(files, prompts, log.keys, settings.max_new_tokens)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    return _Plan(files=files, requests=requests, log=log, deepspeed=deepspeed)


def _backend(
    arguments: SamplingArguments, plan: _Plan, settings: GenerationSettings, comm: Comm
) -> Backend:
    if arguments.backend == "vllm":
        from gem_ds.evaluate.vllm_backend import Vllm

        return Vllm(plan.files, settings)
    return Transformers(
        load_model(plan.files, plan.deepspeed, comm),
        plan.files.tokenizer,
        settings,
        batch_size=arguments.batch_size,
        synced_ranks=plan.deepspeed is not None,
    )


def _sample_pending(
    arguments: SamplingArguments, plan: _Plan, backend: Backend, done: set[Key], comm: Comm
) -> None:
    """Run what is not done, round by round, and append it to the file."""
    if comm.is_main:
        for name in (RESULTS_FILE, VERDICTS_FILE):
            Path(arguments.output_dir, name).unlink(missing_ok=True)
    is_shown = comm.is_main and not arguments.disable_tqdm
    total, initial = len(plan.requests), len(done)
    progress = Progress("Sampling", total, "sample", initial=initial, is_shown=is_shown)
    with closing(progress):
        for batches in _rounds(backend.batches(plan.requests), done, comm.world_size):
            finished = _answer(batches, backend, comm)
            with comm.agreement():
                if comm.is_main:
                    plan.log.append(finished)
            progress.advance(sum(request.key not in done for request, _ in finished))


def _rounds(
    groups: list[list[list[Request]]], done: set[Key], world_size: int
) -> Iterator[list[list[Request]]]:
    """Batches that are run at the same time, one per rank; the last of a group may be fewer.

    A batch that is done in part is run as a whole again: its samples might round otherwise alone.
    """
    for group in groups:
        pending = [batch for batch in group if any(r.key not in done for r in batch)]
        for first in range(0, len(pending), world_size):
            yield pending[first : first + world_size]


def _answer(
    batches: list[list[Request]], backend: Backend, comm: Comm
) -> list[tuple[Request, Completion]]:
    """One round; every rank receives what all have made."""
    completions: list[Completion] = []
    if backend.synced_ranks:  # a failing rank cannot be waited for: the others are in its passes
        completions = backend.complete(batches[comm.rank % len(batches)])
    else:
        with comm.agreement():
            if comm.rank < len(batches):
                completions = backend.complete(batches[comm.rank])
    gathered = comm.gather_objects(completions)[: len(batches)]
    return [
        pair
        for batch, answers in zip(batches, gathered, strict=True)
        for pair in zip(batch, answers, strict=True)
    ]
