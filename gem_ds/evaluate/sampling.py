"""Sampling: prompts -> samples.jsonl, which scoring reads.

A run that was interrupted continues when it is started again with the same flags, and the file is
the same, byte for byte, as if it had not been. Under `torchrun` or `deepspeed` the ranks share the
batches, and rank 0 writes the file, again the same one. (All of this where kernels are
deterministic, at one batch size; `evaluate.generation` says what rounding can change.)

    round:   rank 0   rank 1   rank 2        after each round the completions are gathered,
             batch 0  batch 1  batch 2       rank 0 appends them to the file,
             batch 3  batch 4  (batch 3)     and no rank goes on before the others

With `--deepspeed` (ZeRO-3, for a model larger than one GPU) all ranks must take part in every
forward pass: one that has no batch left repeats another's, and its answers are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from gem_ds.distributed.comm import Comm
from gem_ds.evaluate.decoding import Transformers
from gem_ds.evaluate.generation import (
    Completion,
    GenerationSettings,
    Key,
    Prompt,
    Request,
    ending_turns,
    make_requests,
)
from gem_ds.evaluate.model import (
    SamplingArguments,
    check_arguments,
    joined_ranks,
    load_model,
    model_facts,
    open_files,
)
from gem_ds.evaluate.samples import SAMPLES_FILE, Sample, SampleLog
from gem_ds.evaluate.vllm_backend import Vllm
from gem_ds.progress import Progress

#: What answers requests: one batch after another, ranks those of one group at the same time.
Backend = Transformers | Vllm

RESULTS_FILE = "results.json"
VERDICTS_FILE = "verdicts.jsonl"


def sample_all(
    arguments: SamplingArguments,
    prompts: Mapping[str, Prompt],
    settings: GenerationSettings,
    *,
    num_samples: int = 1,
    form: Mapping[str, Any] | None = None,
) -> list[Sample] | None:
    """Sample every prompt `num_samples` times; write or continue output_dir/samples.jsonl.

    Earlier results and verdicts are deleted before the file changes. `arguments.limit` is the
    caller's to apply; `form` tells how prompts are made, where not by default. The samples come
    back by task in the order of `prompts` and then by number; every rank but the first gets None.
    Raises as `evaluator.evaluate`.
    """
    check_arguments(arguments)
    folder = Path(arguments.output_dir)
    with joined_ranks(arguments) as comm:
        with comm.agreement():  # what can be refused is refused before any weight is loaded
            files, deepspeed = open_files(arguments)
            settings = ending_turns(settings, prompts.values(), files.tokenizer)
            described = {  # all that decides a sample beside its prompt and its number
                **model_facts(arguments, files),
                "dtype": files.dtype,
                "backend": arguments.backend,
                **asdict(settings),
                **(form or {}),
            }
            path = folder / SAMPLES_FILE if comm.is_main else None
            overwrite = arguments.overwrite_output_dir
            log = SampleLog(path, prompts, num_samples, described, overwrite=overwrite)
            requests = make_requests(files, prompts, log.keys, settings.max_new_tokens)
            if comm.is_main:
                folder.mkdir(parents=True, exist_ok=True)
        done = comm.broadcast_object(set(log.samples))
        if len(done) < len(requests):
            backend: Backend
            if arguments.backend == "vllm":
                backend = Vllm(files, settings)
            else:
                backend = Transformers(
                    load_model(files, deepspeed, comm),
                    files.tokenizer,
                    settings,
                    batch_size=arguments.batch_size,
                    synced_ranks=deepspeed is not None,
                )
            if comm.is_main:
                for name in (RESULTS_FILE, VERDICTS_FILE):
                    (folder / name).unlink(missing_ok=True)
            show_bar = comm.is_main and not arguments.disable_tqdm
            _sample_pending(requests, done, log, backend, comm, show_bar=show_bar)
        return log.finish() if comm.is_main else None


def _sample_pending(
    requests: list[Request],
    done: set[Key],
    log: SampleLog,
    backend: Backend,
    comm: Comm,
    *,
    show_bar: bool,
) -> None:
    """Run what is not done, round by round, and append it to the file.

    A batch that is done in part is run whole again: its samples might round otherwise alone.
    """
    progress = Progress("Sampling", len(requests), "sample", initial=len(done), is_shown=show_bar)
    with closing(progress):
        for group in backend.batches(requests):
            pending = [batch for batch in group if any(r.key not in done for r in batch)]
            for first in range(0, len(pending), comm.world_size):
                finished = _answer(pending[first : first + comm.world_size], backend, comm)
                with comm.agreement():
                    if comm.is_main:
                        log.append(finished)
                progress.advance(sum(request.key not in done for request, _ in finished))


def _answer(
    batches: list[list[Request]], backend: Backend, comm: Comm
) -> list[tuple[Request, Completion]]:
    """One round, a batch for each rank or fewer; every rank receives what all have made."""
    completions: list[Completion] = []
    if backend.synced_ranks:  # a failing rank cannot be waited for: the others are in its passes
        completions = backend.complete(batches[comm.rank % len(batches)])
    else:
        with comm.agreement():
            if comm.rank < len(batches):
                completions = backend.complete(batches[comm.rank])
    gathered = comm.gather_objects(completions)[: len(batches)]
    return list(zip(chain(*batches), chain(*gathered), strict=True))
