"""Running cells: several at once, each in its own processes, none twice, nothing finished lost.

A cell that is not finished starts afresh, but for one that lacks its evaluation only. It does not
go on from a checkpoint: it would not calibrate again, and report neither time nor memory of that.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import IO, Any

from gem_ds.comparison.cell_folder import (
    CELL_FILE,
    LOG_FILE,
    clear,
    commands_of,
    discard,
    is_finished,
    last_line,
    lock,
    refuse_other_commands,
)
from gem_ds.comparison.cells import Cell, evaluation_command, folder_of, training_command
from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.results import read_result
from gem_ds.errors import Interrupted
from gem_ds.files.atomic import make_folder, save_json

#: Seconds that a child has after SIGTERM, which ends training after the present step.
GRACE = 30.0

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(kw_only=True)
class _Child:
    """A cell at work."""

    cell: Cell
    slot: int
    process: subprocess.Popen[bytes]
    is_training: bool
    started: float = field(default_factory=time.monotonic)


class Runner:
    """Runs the cells of one comparison."""

    def __init__(self, comparison: Comparison, say: Callable[[str], object] = print) -> None:
        self.comparison, self.say = comparison, say
        self.num_signals = 0

    def run(self, cells: Sequence[Cell]) -> dict[Cell, str]:
        """Bring cells to their end; returns those that failed, with the last line of their log.

        Raises:
            ValueError: a folder holds other commands, or a process that is still at work.
            Interrupted: by a signal.
        """
        for cell in cells:
            refuse_other_commands(self.comparison, cell)
        waiting = deque(cell for cell in cells if not is_finished(self.comparison, cell))
        self.num_done, self.num_all = len(cells) - len(waiting), len(cells)
        if self.num_done:
            self.say(f"{self.num_done} of {self.num_all} runs are finished already")
        failures: dict[Cell, str] = {}
        children: dict[int, _Child] = {}
        with self.noticing_signals():
            try:
                while waiting or children:
                    for slot in range(self.comparison.num_parallel):
                        if slot not in children and waiting:
                            children[slot] = self.start(waiting.popleft(), slot)
                    time.sleep(0.05)
                    if self.num_signals:
                        raise Interrupted
                    for slot, child in list(children.items()):
                        if child.process.poll() is not None:
                            del children[slot]
                            if following := self.end(child, failures):
                                children[slot] = following
            finally:
                self.stop(list(children.values()))
        return failures

    def start(self, cell: Cell, slot: int) -> _Child:
        """Start the first command of a cell that has not come to its end."""
        folder = folder_of(self.comparison, cell)
        make_folder(folder)
        with open(folder / LOG_FILE, "ab") as log:
            lock(log, folder)
            is_training = not is_finished(self.comparison, cell, training_only=True)
            if is_training:
                clear(folder)
                log.truncate(0)
                save_json(folder / CELL_FILE, commands_of(self.comparison, cell))
                command = training_command(self.comparison, cell)
            else:
                command = evaluation_command(self.comparison, cell) or []
            process = self.spawn(command, slot, log)
            return _Child(cell=cell, slot=slot, process=process, is_training=is_training)

    def spawn(self, command: Sequence[str], slot: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own, out of reach of the terminal's Ctrl-C."""
        words = [sys.executable if command[0] == "python" else command[0], *command[1:]]
        bin_folder = str(Path(sys.executable).parent)  # where the launchers of this environment are
        threads = max(1, len(os.sched_getaffinity(0)) // self.comparison.num_parallel)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
        search_path = (bin_folder, os.environ.get("PATH", os.defpath))
        environment["PATH"] = os.pathsep.join(search_path)
        if self.comparison.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.comparison.devices[slot]
        try:
            streams: dict[str, Any] = {
                "stdin": subprocess.DEVNULL,
                "stdout": log,
                "stderr": subprocess.STDOUT,
            }
            return subprocess.Popen(words, env=environment, start_new_session=True, **streams)
        except (FileNotFoundError, PermissionError) as error:
            raise ValueError(f"{words[0]} cannot be started: {error.strerror}.") from None

    def end(self, child: _Child, failures: dict[Cell, str]) -> _Child | None:
        """Note what came of a child; the next command of its cell, started, if there is one."""
        cell, folder = child.cell, folder_of(self.comparison, child.cell)
        status = child.process.returncode
        _signal_group(child.process, signal.SIGKILL)  # whatever a failed launcher has left behind
        if status != 0 or not is_finished(self.comparison, cell):
            is_trained = is_finished(self.comparison, cell, training_only=True)
            if status == 0 and child.is_training and is_trained:
                return replace(self.start(cell, child.slot), started=child.started)
            how = f"exit status {status}" if status else "no whole results"
            failures[cell] = f"{last_line(folder / LOG_FILE) or 'nothing printed'} ({how})"
        self.num_done += 1
        seconds = time.monotonic() - child.started
        if cell in failures:
            news = f"FAILED: {failures[cell]}; see {folder / LOG_FILE}"
        else:
            result = read_result(self.comparison, cell)
            news = f"{result.metric} {result.score:.4g}"
            discard(folder, is_search=cell.split == "dev")
        self.say(f"[{self.num_done}/{self.num_all}] {cell}: {news} ({seconds:.0f} s)")
        return None

    def stop(self, children: Sequence[_Child]) -> None:
        """End children: SIGTERM, and SIGKILL after the grace or at a second signal."""
        for child in children:
            _signal_group(child.process, signal.SIGTERM)
        deadline, num_signals = time.monotonic() + GRACE, self.num_signals
        while any(child.process.poll() is None for child in children):
            if time.monotonic() > deadline or self.num_signals > num_signals:
                break
            time.sleep(0.05)
        for child in children:
            _signal_group(child.process, signal.SIGKILL)
            child.process.wait()

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


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal a child and its children, as far as they are there."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
