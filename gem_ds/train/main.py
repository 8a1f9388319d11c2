"""Fine-tune a language model: what `deepspeed launch/train.py` runs, and what Python can call.

    deepspeed launch/train.py --deepspeed ds_configs/zero3.json --model_name_or_path M \
        --task gsm8k --output_dir O

    result = gem_ds.finetune(model_name_or_path="M", task="gsm8k", output_dir="O", density=0.001)

    text -> data -> calibrate (scores -> budget -> selection) -> fit -> delta

Under plain `python` it runs in one process. What can be refused is refused before the weights are
loaded, on all ranks together.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.process_group import init_distributed, leave_distributed
from gem_ds.errors import PeerError
from gem_ds.progress import loading_bars
from gem_ds.train.arguments import as_flags, parse_arguments
from gem_ds.train.config import Arguments
from gem_ds.train.output_dir import clear_output_dir, output_dir_of_one_run
from gem_ds.train.prepare import PreparedRun, prepare
from gem_ds.train.run import Run

_LIBRARY: Any = transformers.utils.logging  # has no types


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a training run has come to, the same on every rank.

    Attributes:
        output_dir: the run's folder.
        results: the content of ``all_results.json``; empty where the run only made a mask or was
            stopped.
        metrics: the task's metrics on the held-out examples, by name; empty where they are not
            measured in training, as those of generated answers (the programs of ``eval`` do that).
        log_history: the lines of ``metrics.jsonl``.
        mask: ``mask.safetensors`` of a sparse method.
        delta: ``delta.safetensors`` of a finished run of a sparse method or of bitfit.
        adapter: the folder of peft that lora, ia3 and shira leave.
        model: the Hugging Face folder that full fine-tuning leaves.
        stopped: whether a SIGTERM ended the run early; ``resume_from_checkpoint="last"`` goes on.

    A path is None where there is no such file in the folder.
    """

    output_dir: Path
    results: dict[str, Any]
    metrics: dict[str, float]
    log_history: list[dict[str, Any]]
    mask: Path | None
    delta: Path | None
    adapter: Path | None
    model: Path | None
    stopped: bool


def finetune(**flags: Any) -> RunResult:
    """Fine-tune a model; the same run, with the same checks and files, as the command line's.

        result = gem_ds.finetune(model_name_or_path="M", task="gsm8k", output_dir="O",
                                 density=0.001, learning_rate=1e-3, seed=1)
        result.delta                 # O/delta.safetensors
        result.results["last_eval_loss"]

    Calls may follow one another in a process. Under a launcher every rank calls it.

    Args:
        flags: those of ``launch/train.py --help`` by their names, as numbers, texts, truth values,
            paths or lists of texts; ``config="recipe.yaml"`` gives defaults.

    Returns:
        What the run has come to.

    Raises:
        ValueError, OSError: a flag, a file or the run is at fault, in one sentence. On ranks that
            only follow another one's failure, :class:`gem_ds.distributed.comm.PeerError`.
    """
    return main(as_flags(flags))


def main(argv: Sequence[str] | None = None) -> RunResult:
    """The command line; raises as :func:`finetune`."""
    comm = init_distributed()
    try:
        with ExitStack() as stack:
            stack.enter_context(_silent_libraries())
            with comm.agreement():
                args = parse_arguments(sys.argv[1:] if argv is None else argv)
                prepared = prepare(args, comm.world_size)
            with comm.in_unison():
                _refuse_other_runs(args, prepared, comm)
            with comm.agreement():
                if comm.is_main:
                    stack.enter_context(output_dir_of_one_run(prepared.output_dir))
                    overwrite = args.train.overwrite_output_dir
                    clear_output_dir(prepared.output_dir, overwrite=overwrite)
            show_bars = comm.is_main and not args.train.disable_tqdm
            stack.enter_context(loading_bars(is_shown=show_bars))
            run = Run(args, prepared, comm)
            results = run.run()
    except (ValueError, OSError, PeerError):
        leave_distributed()  # after any other error a peer may wait, and leaving would wait for it
        raise
    leave_distributed()
    files = {
        "mask": "mask.safetensors",
        "delta": "delta.safetensors",
        "adapter": "adapter",
        "model": "model",
    }
    paths = {key: prepared.output_dir / name for key, name in files.items()}
    return RunResult(
        output_dir=prepared.output_dir,
        results=results,
        metrics=results.get("eval_metrics", {}),
        log_history=run.state.log_history,
        stopped=run.is_stopped,
        **{key: path if path.exists() else None for key, path in paths.items()},
    )


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """While the block lasts, transformers tells errors only."""
    verbosity = _LIBRARY.get_verbosity()
    _LIBRARY.set_verbosity_error()
    try:
        yield
    finally:
        _LIBRARY.set_verbosity(verbosity)


def _refuse_other_runs(args: Arguments, prepared: PreparedRun, comm: Comm) -> None:
    """Refuse ranks that have read different flags or files.

    Raises:
        ValueError: on all ranks alike.
    """
    flags = replace(args.train, local_rank=-1), replace(args.method, mask=None)  # a mask's content
    digest = f"{prepared.digest()} {flags}"
    if comm.any(comm.broadcast_object(digest) != digest):
        raise ValueError(
            "The ranks do not see the same run: give all nodes the same flags, data, mask, "
            "checkpoint and DeepSpeed JSON."
        )
