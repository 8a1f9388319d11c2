"""The processes of one contender, what they are told, and what they need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gem_ds.distributed.comm import free_port

_WORKER = Path(__file__).resolve().parents[1] / "step_worker.py"


@dataclass(kw_only=True)
class Ranks:
    """The processes of one contender."""

    processes: list[subprocess.Popen[str]]  # one for each rank
    answers: Any  # of rank 0, a line each
    start_seconds: float = 0.0  # that calibration took; known once they are ready

    @classmethod
    def start(
        cls, name: str, flags: Sequence[str], world_size: int, *, is_weighed: bool = False
    ) -> Ranks:
        """Start a contender under the trainer's flags; :meth:`wait` until it is ready.

        If it ``is_weighed``, freed memory is given back at once, so that what is resident is what
        lives, and tensors of the host are told apart; both take time.
        """
        reading, writing = os.pipe()
        port, cores = free_port(), len(os.sched_getaffinity(0))
        environment = {
            "OMP_NUM_THREADS": str(max(1, cores // world_size)),
            "WORLD_SIZE": str(world_size),
            "LOCAL_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        if is_weighed:
            environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
            flags = ["--is_weighed", *flags]
        processes = [
            subprocess.Popen(
                [sys.executable, str(_WORKER), "--name", name, "--answers", str(writing), *flags],
                env=os.environ | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[writing],
                text=True,
            )
            for rank in range(world_size)
        ]
        os.close(writing)
        return cls(processes=processes, answers=os.fdopen(reading))

    def wait(self) -> None:
        """Wait until it has taken its first step."""
        self.start_seconds = self.listen()

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
        self.answers.close()


def needs_of(name: str, flags: Sequence[str], world_size: int) -> dict[str, Any]:
    """What a contender sends, holds and writes, found in processes that are started for it."""
    ranks = Ranks.start(name, flags, world_size, is_weighed=True)
    try:
        ranks.wait()
        return needs_now(ranks)
    finally:
        ranks.close()


def needs_now(ranks: Ranks) -> dict[str, Any]:
    """The same of processes that are there."""
    ranks.ask("step 2")  # ZeRO-3 gathers ahead once it knows the order
    questions = ("count", "report", "operations", "checkpoint")
    return {key: value for each in questions for key, value in ranks.ask(each).items()}
