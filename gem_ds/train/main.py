"""Fine-tune a language model: what `deepspeed launch/train.py` runs, and what Python can call.

    text -> data -> calibrate (scores -> budget -> selection) -> fit -> delta

Under plain `python` it runs in one process. What can be refused is refused before the weights are
loaded, on all ranks together.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.process_group import init_distributed, leave_distributed
from gem_ds.distributed.watchdog import watching
from gem_ds.errors import PeerError
from gem_ds.files.mask import Mask
from gem_ds.progress import loading_bars
from gem_ds.train.arguments import as_flags, parse_arguments
from gem_ds.train.output_dir import clear_output_dir, output_dir_of_one_run
from gem_ds.train.prepare import PreparedRun, prepare
from gem_ds.train.run import Run

_LIBRARY: Any = transformers.utils.logging  # has no types


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a training run has come to, the same on every rank.

    A path is None where there is no such file in the folder. ``metrics`` are the task's on the
    held-out examples; those of generated answers are left to the programs of ``eval``.
    """

    output_dir: Path
    results: dict[str, Any]  # all_results.json; empty if only a mask was made, or if stopped
    metrics: dict[str, float]
    log_history: list[dict[str, Any]]  # the lines of metrics.jsonl
    mask: Path | None  # mask.safetensors of a sparse method
    delta: Path | None  # delta.safetensors of a finished run of a sparse method or of bitfit
    adapter: Path | None  # the folder of peft that lora, ia3 and shira leave
    model: Path | None  # the Hugging Face folder that full fine-tuning leaves
    stopped: bool  # a SIGTERM or Ctrl-C ended it; resume_from_checkpoint="last" goes on


def finetune(**flags: Any) -> RunResult:
    """Fine-tune a model; the same run, with the same checks and files, as the command line's.

        result = gem_ds.finetune(model_name_or_path="M", task="gsm8k", output_dir="O",
                                 density=0.001, learning_rate=1e-3, seed=1)
        result.delta                 # O/delta.safetensors
        result.results["last_eval_loss"]

    Calls may follow one another in a process. Under a launcher every rank calls it.

    Args:
        flags: those of ``launch/train.py --help`` by their names, as numbers, texts, truth values,
            paths or lists of texts; ``mask`` may be a :class:`gem_ds.Mask`, too;
            ``config="recipe.yaml"`` gives defaults.

    Raises:
        ValueError, OSError: a flag, a file or the run is at fault, in one sentence. On ranks that
            only follow another one's failure, :class:`gem_ds.distributed.comm.PeerError`.
    """
    mask = flags.pop("mask") if isinstance(flags.get("mask"), Mask) else None
    return main(as_flags(flags), mask)


def main(argv: Sequence[str] | None = None, mask: Mask | None = None) -> RunResult:
    """The command line, or with a mask in memory; raises as :func:`finetune`."""
    comm = init_distributed()
    try:
        with ExitStack() as stack:
            stack.callback(_LIBRARY.set_verbosity, _LIBRARY.get_verbosity())
            _LIBRARY.set_verbosity_error()
            with comm.agreement():
                flags = list(sys.argv[1:] if argv is None else argv)
                if mask is not None:
                    path = Path(stack.enter_context(TemporaryDirectory()), "mask.safetensors")
                    mask.save(path)
                    flags.append(f"--mask={path}")
                args = parse_arguments(flags)
            stack.enter_context(watching(comm, args.train.watchdog_seconds))
            with comm.agreement():
                prepared = prepare(args, comm.world_size)
            with comm.in_unison():
                _refuse_other_runs(prepared, comm)
            train, folder = prepared.args.train, prepared.output_dir
            matmul = torch.backends.cuda.matmul  # which images switch by their environment
            stack.callback(setattr, matmul, "allow_tf32", matmul.allow_tf32)
            matmul.allow_tf32 = train.tf32
            with comm.agreement():
                if comm.is_main:
                    stack.enter_context(output_dir_of_one_run(folder))
                    clear_output_dir(folder, overwrite=train.overwrite_output_dir)
                    num_examples, task = len(prepared.data.train), prepared.args.data.task
                    name = prepared.args.model.model_name_or_path
                    for note in prepared.notes:
                        print(note)
                    print(f"Loading {name} to train on {num_examples:,} examples of {task}")
                    if reach := prepared.targets.reach:
                        print(reach)
                    sys.stdout.flush()
            show_bars = comm.is_main and not train.disable_tqdm
            stack.enter_context(loading_bars(is_shown=show_bars))
            run = Run(prepared, comm)
            results = run.run()
    except (ValueError, OSError, PeerError):
        leave_distributed()  # after any other error a peer may wait, and leaving would wait for it
        raise
    leave_distributed()
    names = ("mask.safetensors", "delta.safetensors", "adapter", "model")
    files = {path.stem: path if path.exists() else None for path in map(folder.joinpath, names)}
    return RunResult(
        output_dir=folder,
        results=results,
        metrics=results.get("eval_metrics", {}),
        log_history=run.state.log_history,
        stopped=run.is_stopped,
        **files,
    )


def _refuse_other_runs(prepared: PreparedRun, comm: Comm) -> None:
    """Refuse, on all ranks alike, ranks that have read different flags or files."""
    train, method = prepared.args.train, prepared.args.method
    flags = replace(train, local_rank=-1), replace(method, mask=None)  # a mask's content
    digest = f"{prepared.digest()} {flags}"
    if comm.any(comm.broadcast_object(digest) != digest):
        raise ValueError(
            "The ranks do not see the same run: give all nodes the same flags, data, mask, "
            "checkpoint and DeepSpeed JSON."
        )
