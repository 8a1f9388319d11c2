"""Fine-tune a language model with GEM: what `deepspeed` runs.

    deepspeed launch/train.py --deepspeed ds_configs/zero3.json --model_name_or_path M \
        --task gsm8k --output_dir O

    text -> data -> calibrate (scores -> budget -> selection) -> fit -> delta

Under plain `python` it runs in one process. What can be refused is refused before the weights are
loaded, on all ranks together.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import transformers

from gem_ds.distributed.comm import Comm, PeerError
from gem_ds.distributed.process_group import init_distributed, leave_distributed
from gem_ds.files.atomic import sentence_of
from gem_ds.train.arguments import Arguments, parse_arguments
from gem_ds.train.output_dir import clear_output_dir, output_dir_of_one_run
from gem_ds.train.prepare import Plan, prepare
from gem_ds.train.run import Run


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run one training and return its results (the content of all_results.json).

    Raises:
        ValueError, OSError: bad input or a failed run, in one sentence. On ranks that only follow
            another one's failure, :class:`gem_ds.distributed.comm.PeerError`.
    """
    transformers.utils.logging.set_verbosity_error()
    comm = init_distributed()
    try:
        with comm.agreement():
            args = parse_arguments(sys.argv[1:] if argv is None else argv)
            plan = prepare(args, comm.world_size)
        with comm.in_unison():
            refuse_other_plans(args, plan, comm)
        with ExitStack() as stack:
            with comm.agreement():
                if comm.is_main:
                    stack.enter_context(output_dir_of_one_run(plan.output_dir))
                    clear_output_dir(plan.output_dir, overwrite=args.train.overwrite_output_dir)
            if args.train.disable_tqdm or not comm.is_main:
                transformers.utils.logging.disable_progress_bar()
            results = Run(args, plan, comm).run()
    except (ValueError, OSError, PeerError):
        leave_distributed()  # after any other error a peer may wait, and leaving would wait for it
        raise
    leave_distributed()
    return results


def refuse_other_plans(args: Arguments, plan: Plan, comm: Comm) -> None:
    """Refuse ranks that have read different flags or files.

    Raises:
        ValueError: on all ranks alike.
    """
    flags = replace(args.train, local_rank=-1), replace(args.method, mask=None)  # a mask's content
    digest = f"{plan.digest()} {flags}"
    if comm.any(comm.broadcast_object(digest) != digest):
        raise ValueError(
            "The ranks do not see the same run: give all nodes the same flags, data, mask, "
            "checkpoint and DeepSpeed JSON."
        )


def run_as_program() -> int:
    """Run :func:`main` as a command: errors end in one sentence and a non-zero status."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to each other
    try:
        main()
    except PeerError:
        return 1
    except (ValueError, OSError) as error:
        rank = int(os.environ.get("RANK", 0))
        place = f"On rank {rank}: " if rank else ""
        print(f"Error: {place}{sentence_of(error)}", file=sys.stderr, flush=True)
        return 1
    return 0
