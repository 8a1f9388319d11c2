"""One rank of one contender: builds it through the trainer, then steps when it is told to.

Commands come as lines on standard input, the same on every rank; rank 0 answers each with a line
of JSON on the file descriptor ``--answers``, after a first one with the seconds of calibration.

    step N      take N steps              seconds of each
    count       take one step             bytes handed to collectives, peak of memory
    operations  take one step             what it computes and keeps, as torch dispatches it
    report      (after the steps)         peak of calibration, state
    checkpoint  write one                 its size
    profile     take one step             a table of the operations that take most of it
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from steps.baselines import DenseMasked, Floor, LoraByDefault, LoraOfLeaves, Tuner
from steps.host_tensors import HostTensors
from steps.memory import library_bytes, peak_bytes, start_peak
from steps.operations import count_operations
from steps.shapes import made_weights
from steps.traffic import Collectives
from torch.profiler import ProfilerActivity, profile

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.process_group import init_distributed, leave_distributed
from gem_ds.train.arguments import parse_arguments
from gem_ds.train.fit import fit
from gem_ds.train.prepare import prepare
from gem_ds.train.run import Run

_BASELINES = {
    "floor": Floor,
    "tuner": Tuner,
    "lora_default": LoraByDefault,
    "lora_leaves": LoraOfLeaves,
    "dense_masked": DenseMasked,
}


class Contender:
    """A training run that has come to its first step."""

    def __init__(self, name: str, flags: list[str], comm: Comm) -> None:
        self.comm = comm
        args = parse_arguments(flags)
        prepared = prepare(args, comm.world_size)
        self.libraries = library_bytes()  # loaded by now
        with made_weights(Path(str(args.model.model_name_or_path)), comm.device):
            self.run = Run(prepared, comm, _BASELINES.get(name))
        self.tuning: Any = self.run.tuning
        summed_loss = self.run.settled_loss()
        start_peak(comm.device)
        started = time.perf_counter()
        if self.run.sparse:
            self.run.sparse.start(self.run.calibration_batches(), summed_loss)
        self.start_seconds = time.perf_counter() - started
        self.calibration_peak = peak_bytes(comm.device, self.libraries)
        self.steps = fit(
            self.tuning.engine,
            self.run.sparse.parts if self.run.sparse else [],
            self.run.train_batches,
            summed_loss,
            self.run.scheduler,
            self.run.state,
            seed=args.train.seed,
        )
        next(self.steps)  # optimizer states come with the first step

    def step(self, number: int) -> list[float]:
        """Take steps; returns the seconds of each."""
        seconds = []
        for _ in range(number):
            started = self.now()
            next(self.steps)
            seconds.append(self.now() - started)
        return seconds

    def now(self) -> float:
        """The time, once the device has done what it was asked."""
        if self.comm.device.type == "cuda":
            torch.cuda.synchronize(self.comm.device)
        return time.perf_counter()

    def count(self) -> dict[str, int]:
        """What one step sends and what it holds."""
        start_peak(self.comm.device)
        collectives = Collectives()
        with collectives.counted():
            next(self.steps)
        peak = self.comm.largest(peak_bytes(self.comm.device, self.libraries))
        return dataclasses.asdict(collectives) | {"peak_bytes": peak}

    def operations(self) -> dict[str, int]:
        """What one step computes and keeps."""
        return count_operations(lambda: next(self.steps))

    def report(self) -> dict[str, float]:
        """What the steps needed."""
        return {
            "num_trainable": self.tuning.num_trainable,
            "calibration_peak_bytes": self.comm.largest(self.calibration_peak),
            "state_bytes": self.sum(self.tuning.engine.optimizer_state_bytes()),
        }

    def checkpoint(self) -> dict[str, int]:
        """Size of what a run needs to go on: the trainer's checkpoint, or DeepSpeed's own."""
        folder = self.run.prepared.output_dir / "sizes"
        if hasattr(self.tuning, "entries"):
            self.tuning.save_checkpoint(self.run.state)
            (folder,) = self.run.prepared.output_dir.glob("checkpoint-*")
        elif self.tuning.num_trainable:
            self.tuning.engine._engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)
        self.comm.any(False)  # every rank has written
        sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
        return {"checkpoint_bytes": sum(sizes)}

    def profile(self) -> str:
        """The operations of one step, those first that take most time of the device itself."""
        device = self.comm.device.type
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if device == "cuda" else []
        with profile(activities=activities) as record:
            self.step(1)
        operations = record.key_averages()
        order = f"self_{device}_time_total"
        return str(operations.table(order, row_limit=15, max_name_column_width=50))

    def sum(self, value: int) -> int:
        """Over the ranks."""
        return int(self.comm.all_reduce(torch.tensor([value], device=self.comm.device), "sum"))


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--answers", type=int, required=True)
    parser.add_argument("--is_weighed", action="store_true", help="counts, and takes its time")
    args, flags = parser.parse_known_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    comm = init_distributed()
    telling = HostTensors() if args.is_weighed else nullcontext()
    with telling, tempfile.TemporaryDirectory() as folder:
        shared = comm.broadcast_object(folder)
        contender = Contender(args.name, [*flags, "--output_dir", shared], comm)
        answers = os.fdopen(args.answers, "w") if comm.is_main else None

        def answer(value: Any) -> None:
            if answers:
                answers.write(json.dumps(value) + "\n")
                answers.flush()

        answer(contender.start_seconds)
        for line in sys.stdin:
            command, *words = line.split()
            answer(getattr(contender, command)(*map(int, words)))
    leave_distributed()


if __name__ == "__main__":
    main()
