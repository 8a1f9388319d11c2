"""What one training step costs: gem beside what a user would pick instead, and beside the floor.

    python benchmarks/step.py [--shape opt-125m] [--world_size 1] [--stage 0] [--output_dir DIR]

Each contender is a training run of its own, one process per rank, with random weights and random
tokens, all of which are learnt. They take turns: in a round each takes a few steps while the others
sleep, so that whatever else the machine does meets all alike.

    floor          forward and input gradients of the frozen model
    gem            density 0.001 on the query and value projections
    lora, shira    through peft, on the same layers, with at least as many parameters
    dense_masked   the way of the published code: trainable dense copies, a mask, dense AdamW
    full           every parameter

shira and dense_masked add to whole weights, so at stage 3 they are left out.

Ratios are taken within a round; shown are medians over the rounds and in brackets the 95 % interval
of the median (bootstrap). Memory on a CPU is the resident set above that of the libraries, its peak
while stepping; on a GPU the allocator's peak; of the rank that needs most. State is masters and
moments, summed over the ranks; traffic is the size of all messages of a step, each counted once,
apart from the gathers of weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from steps.shapes import SHAPES, adapter_size, write_data, write_model

from gem_ds.comm import free_port

HERE = Path(__file__).resolve().parent
WORKER = HERE / "step_worker.py"
CONTENDERS = ("floor", "gem", "lora", "shira", "dense_masked", "full")
NEED_WHOLE_WEIGHTS = ("shira", "dense_masked")  # which stage 3 cuts
GIB = 2.0**30


@dataclass(kw_only=True)
class Ranks:
    """The processes of one contender."""

    processes: list[subprocess.Popen[str]]
    answers: Any

    def ask(self, command: str) -> Any:
        """Give all ranks a command; returns rank 0's answer."""
        for process in self.processes:
            assert process.stdin
            process.stdin.write(f"{command}\n")
            process.stdin.flush()
        return self.listen()

    def listen(self) -> Any:
        """Rank 0's next answer."""
        line = self.answers.readline()
        if not line:
            raise RuntimeError("A contender has died; what it said is above.")
        return json.loads(line)

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            assert process.stdin
            process.stdin.close()
        for process in self.processes:
            process.wait(timeout=60)


def start(name: str, flags: Sequence[str], world_size: int) -> Ranks:
    """Start the ranks of a contender and wait until they have taken their first step."""
    reading, writing = os.pipe()
    port, cores = free_port(), len(os.sched_getaffinity(0))
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores // world_size)),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), "--name", name, "--answers", str(writing), *flags],
            env=os.environ | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[writing],
            text=True,
        )
        for rank in range(world_size)
    ]
    os.close(writing)
    ranks = Ranks(processes=processes, answers=os.fdopen(reading))
    ranks.listen()
    return ranks


def measure(contenders: dict[str, Ranks], rounds: int, steps: int) -> dict[str, np.ndarray]:
    """Seconds per step, [rounds], the median of each round; contenders take turns by chance."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order, chance = list(contenders), random.Random(0)
    for number in range(rounds):
        chance.shuffle(order)
        for name in order:
            seconds[name].append(float(np.median(contenders[name].ask(f"step {steps}"))))
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return {name: np.array(found) for name, found in seconds.items()}


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """The median, and the ends of its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(values, size=(10_000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


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
        gathers, others = found["weights"], found["others"]
        rows.append(
            {
                "": name,
                "trainable": f"{found['num_trainable']:,}",
                "s/step": f"{np.median(seconds[name]):.3f}",
                "of the floor": ratio(name, "floor"),
                "of LoRA": ratio(name, "lora"),
                "peak GiB": f"{found['peak_bytes'] / GIB:.2f}",
                "state bytes": f"{found['state_bytes']:,}",
                "traffic bytes": f"{others:,}",
                "weight gathers": f"{gathers:,}",
                "checkpoint bytes": f"{found['checkpoint_bytes']:,}",
                "to first step s": f"{found['start_seconds']:.1f}",
            }
        )
    return rows


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Rows as a table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def flags_of(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Write model and data into a folder; returns the flags of training for each contender."""
    config = SHAPES[args.shape](args.layers)
    write_model(folder / "model", config)
    num_rows = args.batches * args.world_size * args.batch_size
    write_data(folder / "train.jsonl", num_rows, args.tokens)
    common = {
        "model_name_or_path": folder / "model",
        "task": "jsonl",
        "train_file": folder / "train.jsonl",
        "prompt_field": "prompt",
        "target_field": "target",
        "max_length": args.tokens,
        "per_device_train_batch_size": args.batch_size,
        "max_steps": 10**6,
        "learning_rate": "1e-5",
        "lr_scheduler_type": "constant",
        "deepspeed": HERE.parent / "ds_configs" / f"zero{args.stage}.json",
    }
    switches = ["--disable_tqdm"]
    switches += ["--bf16"] if args.dtype == "bf16" else []
    switches += ["--gradient_checkpointing"] if args.gradient_checkpointing else []
    rank, density_of_rank = adapter_size(config, float(args.density))
    flags = {}
    for name in args.contenders:
        method = name if name in ("lora", "shira", "full") else "gem"
        density = density_of_rank if name == "shira" else args.density
        values = common | {"method": method, "lora_r": rank, "density": density}
        flags[name] = [str(word) for key, value in values.items() for word in (f"--{key}", value)]
        flags[name] += switches
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write it with all numbers where --output_dir says."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/step.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--layers", type=int, help="of the model (default: the shape's own)")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        help="(default: all; shira and dense_masked below stage 3 only)",
    )
    parser.add_argument("--world_size", type=int, default=1, help="processes per contender")
    parser.add_argument("--stage", type=int, default=0, help="of ZeRO")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences per rank")
    parser.add_argument("--tokens", type=int, default=256, help="of a sequence")
    parser.add_argument("--batches", type=int, default=1, help="of data, all for calibration")
    parser.add_argument("--density", default="0.001")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="per contender and round")
    parser.add_argument("--output_dir", type=Path, help="for table.md and numbers.json")
    args = parser.parse_args(argv)
    if args.contenders is None:
        left_out = NEED_WHOLE_WEIGHTS if args.stage == 3 else ()
        args.contenders = [name for name in CONTENDERS if name not in left_out]

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contenders = {}
        for name, flags in flags_of(args, folder).items():
            contenders[name] = start(name, flags, args.world_size)
            stack.callback(contenders[name].close)
            print(f"{name} is ready", file=sys.stderr, flush=True)
        seconds = measure(contenders, args.rounds, args.steps)
        reports = {name: ranks.ask("count") for name, ranks in contenders.items()}
        reports = {name: found | contenders[name].ask("report") for name, found in reports.items()}

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
        numbers = {
            name: found | {"seconds": seconds[name].tolist()} for name, found in reports.items()
        }
        (args.output_dir / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
