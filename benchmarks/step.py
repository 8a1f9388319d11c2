"""What one training step costs: gem beside what a user would pick instead, and beside the floor.

    python benchmarks/step.py [--shape opt-125m] [--world_size 1] [--stage 0] [--output_dir DIR]

Each contender is a training run of its own, one process per rank, with random weights and random
tokens, all of which are learnt. They take turns: in a round each takes a few steps while the others
sleep, so that whatever else the machine does meets all alike.

    floor          forward and input gradients of the frozen model
    gem            density 0.001 on the query and value projections
    tuner          the same entries by number, as an adapter of peft (docs/trainers.md)
    lora, shira    through peft, on the same layers, with at least as many parameters
    lora_default   lora with gradients down to the embedding where blocks are recomputed, as peft
                   and transformers have it when nobody tells them otherwise
    lora_leaves    lora with its blocks gathered whole at stage 3, for which DeepSpeed needs these
                   gradients in any case
    dense_masked   the way of the published code: trainable dense copies, a mask, dense AdamW
    full           every parameter

shira and dense_masked add to whole weights, so at stage 3 they are left out.

Ratios are taken within a round; shown are medians over the rounds and in brackets the 95 % interval
of the median (bootstrap). The rest does not scatter: with ``--rounds 0`` it is all there is. Memory
is the peak of a step, of the rank that needs most: on a GPU the allocator's; on a CPU the resident
set above that of the libraries, in processes of its own that give freed memory back at once, so
that it is what lives. State is masters and moments, summed over the ranks; traffic is the size of
all messages of a step, each counted once, apart from the gathers of weights. GFLOP, launches,
kept (for the backward pass) and waits (of the host for the device) are counted in one step
(`steps/operations.py`). On a GPU all contenders start at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from steps import flags_of
from steps.ranks import Ranks, needs_now, needs_of
from steps.shapes import SHAPES
from steps.table import markdown
from steps.training import CONTENDERS, NEED_WHOLE_WEIGHTS, Training
from steps.turns import interval, take_turns

GIB = 2.0**30


def stepping(ranks: Ranks, steps: int) -> Callable[[], float]:
    """Takes so many steps; returns the median of their seconds."""
    return lambda: float(np.median(ranks.ask(f"step {steps}")))


def rows_of(
    seconds: dict[str, np.ndarray], reports: dict[str, dict[str, float]]
) -> list[dict[str, str]]:
    """The table's rows, one for each contender."""

    def ratio(name: str, other: str) -> str:
        if other not in seconds:
            return ""
        middle, low, high = interval(seconds[name] / seconds[other])
        return f"{middle:.3f} ({low:.3f} to {high:.3f})"

    rows = []
    for name, found in reports.items():
        row = {"": name, "trainable": f"{found['num_trainable']:,}"}
        if name in seconds:
            row |= {
                "s/step": f"{np.median(seconds[name]):.3f}",
                "of the floor": ratio(name, "floor"),
                "of LoRA": ratio(name, "lora"),
                "of gem": ratio(name, "gem"),
            }
        rows.append(
            row
            | {
                "GFLOP": f"{found['flops'] / 1e9:.1f}",
                "launches": f"{found['launches']:,}",
                "waits": f"{found['host_waits']:,}",
                "kept MiB": f"{found['kept_bytes'] / 2**20:.1f}",
                "peak GiB": f"{found['peak_bytes'] / GIB:.2f}",
                "state bytes": f"{found['state_bytes']:,}",
                "messages": f"{found['num_others']:,}",
                "traffic bytes": f"{found['others']:,}",
                "gathers": f"{found['num_gathers']:,}",
                "weight gathers": f"{found['weights']:,}",
                "checkpoint bytes": f"{found['checkpoint_bytes']:,}",
                "to first step s": f"{found['start_seconds']:.1f}",
            }
        )
    return rows


def measure(
    training: Training, args: argparse.Namespace
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]], dict[str, str]]:
    """Seconds of each round, what `step_worker.py` reports, and profiles where asked for."""
    on_gpu = torch.cuda.is_available()
    seconds: dict[str, np.ndarray] = {}
    reports, profiles = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        flags = training.flags(args.contenders, Path(folder))
        with ExitStack() as stack:
            contenders: dict[str, Ranks] = {}
            for name in flags if on_gpu or args.rounds else ():
                contenders[name] = Ranks.start(name, flags[name], args.world_size)
                stack.callback(contenders[name].close)
                if not on_gpu:  # where one's start would take the others' cores
                    contenders[name].wait()
            for name, ranks in contenders.items():
                if on_gpu:
                    ranks.wait()
                print(f"{name} is ready", file=sys.stderr, flush=True)
            if args.rounds:
                actions = {name: stepping(ranks, args.steps) for name, ranks in contenders.items()}
                seconds = take_turns(actions, args.rounds)
            for name, ranks in contenders.items():
                if args.profile:
                    profiles[name] = ranks.ask("profile")
                if on_gpu:
                    reports[name] = needs_now(ranks)
        for name in flags:
            report = reports.get(name) or needs_of(name, flags[name], args.world_size)
            started = contenders[name].start_seconds if name in contenders else 0.0
            reports[name] = report | {"start_seconds": started}
    return seconds, reports, profiles


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = flags_of("step", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--layers", type=int, help="of the model (default: the shape's own)")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        help="(default: all; shira and dense_masked below stage 3 only, lora_leaves at 3 only)",
    )
    parser.add_argument("--world_size", type=int, default=1, help="processes per contender")
    parser.add_argument("--stage", type=int, default=0, help="of ZeRO")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences per rank")
    parser.add_argument("--tokens", type=int, default=256, help="of a sequence")
    parser.add_argument("--batches", type=int, default=1, help="of data, all for calibration")
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--sddmm_kernel", default="auto", help="of gem's sampled gradient")
    parser.add_argument(
        "--max_live_parameters", type=int, help="stage3_max_live_parameters (default: DeepSpeed's)"
    )
    parser.add_argument(
        "--makes_weights",
        action="store_true",
        help="each process draws its weights on its device: no file of them is written and loaded",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="per contender and round")
    parser.add_argument("--profile", action="store_true", help="of one step each, in --output_dir")
    parser.add_argument("--output_dir", type=Path, help="for table.md and numbers.json")
    args = parser.parse_args(argv)
    if args.profile and not args.output_dir:
        parser.error("--profile writes files: pass --output_dir.")
    if args.contenders is None:
        left_out = NEED_WHOLE_WEIGHTS if args.stage == 3 else ("lora_leaves",)
        args.contenders = [name for name in CONTENDERS if name not in left_out]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write it with all numbers where --output_dir says."""
    args = parsed(argv)
    training = Training(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(Training)}
    )
    seconds, reports, profiles = measure(training, args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    table = "\n".join(
        [
            f"{args.shape}, {args.world_size} ranks of {args.batch_size} x {args.tokens} tokens, "
            f"ZeRO {args.stage}, {args.dtype}, {args.rounds} rounds of {args.steps} steps; "
            f"{device or 'CPU'}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}",
            "",
            markdown(rows_of(seconds, reports)),
        ]
    )
    print(table)
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "table.md").write_text(f"{table}\n")
        for name, profile in profiles.items():
            (args.output_dir / f"profile_{name}.txt").write_text(profile)
        numbers = {
            name: found | {"seconds": seconds[name].tolist() if name in seconds else []}
            for name, found in reports.items()
        }
        (args.output_dir / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
