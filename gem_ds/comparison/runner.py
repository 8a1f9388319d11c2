"""Running cells: several at once, each in its own processes, none twice, nothing finished lost.

A cell is finished when its results are whole. Any other starts afresh, but for one that lacks its
evaluation only. It does not go on from a checkpoint: it would not calibrate again, and report
neither time nor memory of that.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from gem_ds.comparison.cells import (
    CELL_FILE,
    LOG_FILE,
    Cell,
    commands_of,
    folder_of,
    refuse_other_commands,
)
from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.results import (
    EVALUATION_FILE,
    RESULTS_FILE,
    SAMPLES_FILE,
    VERDICTS_FILE,
    read_result,
    read_training,
)
from gem_ds.errors import Interrupted
from gem_ds.files.atomic import make_folder, save_json, try_lock
from gem_ds.files.checkpoint import list_checkpoints
from gem_ds.files.manifest import delete_folder, is_ours, listed_files

#: Seconds that a child has after SIGTERM, which ends training after the present step.
GRACE = 30.0

#: Seconds that processes just killed have to go.
PATIENCE = 3.0

#: What is not whole, or of an earlier training, when a cell starts afresh.
RESULTS = (RESULTS_FILE, EVALUATION_FILE, VERDICTS_FILE, SAMPLES_FILE)

#: What a cell of the search need not keep.
WEIGHTS = ("delta.safetensors", "adapter", "model")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Process = subprocess.Popen[bytes]


class Runner:
    """Runs the cells of one comparison."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison, self.num_signals = comparison, 0

    def run(self, cells: Sequence[Cell]) -> dict[Cell, str]:
        """Bring cells to their end; returns those that failed, with the last line of their log.

        Raises:
            ValueError: a folder holds other commands, or a process that is still at work.
            Interrupted: by a signal.
        """
        for cell in cells:
            refuse_other_commands(self.comparison, cell)
        waiting = deque(cell for cell in cells if not self.is_whole(cell))
        self.num_done, self.num_all = len(cells) - len(waiting), len(cells)
        if self.num_done:
            print(f"{self.num_done} of {self.num_all} runs are finished already", flush=True)
        self.failures: dict[Cell, str] = {}

        def processes(slot: int) -> Iterator[Process]:
            while waiting:
                yield from self.work_on(waiting.popleft(), slot)

        # By what yields a slot's processes one after another: the present one.
        at_work: dict[Iterator[Process], Process | None] = dict.fromkeys(
            map(processes, range(self.comparison.num_parallel))
        )
        with self.noticing_signals():
            try:
                while at_work:
                    for queue, process in list(at_work.items()):
                        if process is None or process.poll() is not None:
                            del at_work[queue]
                            if following := next(queue, None):
                                at_work[queue] = following
                    time.sleep(0.05)
                    if self.num_signals:
                        raise Interrupted
            finally:
                self.stop(list(filter(None, at_work.values())))
        return self.failures

    def work_on(self, cell: Cell, slot: int) -> Iterator[Process]:
        """Bring a cell to its end; yields its processes, each of which must end before the next."""
        started, folder = time.monotonic(), folder_of(self.comparison, cell)
        commands = commands_of(self.comparison, cell)
        make_folder(folder)
        for name, command in commands.items():
            with open(folder / LOG_FILE, "ab") as log:
                lock(log, folder)
                if name == "train":
                    if "evaluate" in commands and self.is_whole(cell, training_only=True):
                        continue
                    for name in RESULTS:  # the training clears its own
                        (folder / name).unlink(missing_ok=True)
                    log.truncate(0)
                    save_json(folder / CELL_FILE, commands)
                process = self.spawn(shlex.split(command), slot, log)
            yield process
            _signal_group(process, signal.SIGKILL)  # whatever a failed launcher has left behind
            if process.returncode or not self.is_whole(cell, training_only=True):
                break
        self.conclude(cell, process.returncode, time.monotonic() - started)

    def conclude(self, cell: Cell, status: int, seconds: float) -> None:
        """Note what came of a cell, and delete what it no longer needs."""
        folder = folder_of(self.comparison, cell)
        if status == 0 and self.is_whole(cell):
            result = read_result(self.comparison, cell)
            news = f"{result['metric']} {result['score']:.4g}"
            needless = [*list_checkpoints(folder).values()]
            if cell.split == "dev":
                needless += [folder / name for name in WEIGHTS]
            for path in needless:
                if is_ours(path):
                    delete_folder(path)
                elif path in listed_files(folder):
                    path.unlink()
        else:
            how = f"exit status {status}" if status else "no whole results"
            self.failures[cell] = f"{last_line(folder / LOG_FILE) or 'nothing printed'} ({how})"
            news = f"FAILED: {self.failures[cell]}; see {folder / LOG_FILE}"
        self.num_done += 1
        print(f"[{self.num_done}/{self.num_all}] {cell}: {news} ({seconds:.0f} s)", flush=True)

    def is_whole(self, cell: Cell, *, training_only: bool = False) -> bool:
        """Whether its results, or those of its training alone, are whole."""
        with suppress(ValueError):
            read_training(folder_of(self.comparison, cell))
            return training_only or bool(read_result(self.comparison, cell))
        return False

    def spawn(self, command: Sequence[str], slot: int, log: IO[bytes]) -> Process:
        """Start a command in a session of its own, out of reach of the terminal's Ctrl-C."""
        words = [sys.executable if command[0] == "python" else command[0], *command[1:]]
        bin_folder = str(Path(sys.executable).parent)  # where the launchers of this environment are
        threads = max(1, len(os.sched_getaffinity(0)) // self.comparison.num_parallel)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
        search_path = (bin_folder, os.environ.get("PATH", os.defpath))
        environment["PATH"] = os.pathsep.join(search_path)
        if self.comparison.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.comparison.devices[slot]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        try:
            return subprocess.Popen(
                words, env=environment, start_new_session=True, stdout=log, **streams
            )
        except (FileNotFoundError, PermissionError) as error:
            raise ValueError(f"{words[0]} cannot be started: {error.strerror}.") from None

    def stop(self, processes: Sequence[Process]) -> None:
        """End them: SIGTERM, and SIGKILL after the grace or at a second signal."""
        for process in processes:
            _signal_group(process, signal.SIGTERM)
        deadline, num_signals = time.monotonic() + GRACE, self.num_signals
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline or self.num_signals > num_signals:
                break
            time.sleep(0.05)
        for process in processes:
            _signal_group(process, signal.SIGKILL)
            process.wait()

    @contextmanager
    def noticing_signals(self) -> Iterator[None]:
        """Count signals instead of dying of them: between two lines a child could be forgotten."""

        def count(number: int, frame: FrameType | None) -> None:
            self.num_signals += 1

        earlier = {number: signal.signal(number, count) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)


def lock(log: IO[bytes], folder: Path) -> None:
    """Hold the log, with the child that inherits it: if it outlives us, the next one sees it."""
    deadline = time.monotonic() + PATIENCE
    while not try_lock(log):
        if time.monotonic() > deadline:
            raise ValueError(
                f"A process of an earlier comparison is still at work in {folder}: wait for its "
                "end, or stop it."
            )
        time.sleep(0.05)


def last_line(log: Path) -> str:
    """The last line that says something; progress bars end theirs with a carriage return."""
    text = log.read_bytes()[-10_000:].decode(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return lines[-1] if lines else ""


def _signal_group(process: Process, number: signal.Signals) -> None:
    """Signal a child and its children, as far as they are there."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
