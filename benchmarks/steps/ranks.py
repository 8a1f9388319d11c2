"""The processes of one contender, and what they are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gem_ds.comm import free_port

_WORKER = Path(__file__).resolve().parents[1] / "step_worker.py"


@dataclass(kw_only=True)
class Ranks:
    """The processes of one contender."""

    processes: list[subprocess.Popen[str]]
    answers: Any

    @classmethod
    def start(cls, name: str, flags: Sequence[str], world_size: int) -> Ranks:
        """Start a contender and wait until it has taken its first step."""
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
        ranks = cls(processes=processes, answers=os.fdopen(reading))
        ranks.listen()
        return ranks

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
