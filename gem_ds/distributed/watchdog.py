"""A rank that stops: it is named, and the others end, instead of waiting for it in a collective.

Each process beats: a thread writes a new value under this rank's key in the process group's own
store, and reads those of all. What keeps the main thread busy (loading, compiling, calibration,
evaluation) does not keep the thread from it, so only a process that is stopped, dead or cut off
misses its beats. Silence is counted in rounds of the own thread, not in time: where all ranks were
suspended together, nobody has missed one.

    a rank's beat has stood still       it is lost: the first to see it tells, all end
    the store has not answered          who keeps it is lost: every rank tells and ends
    the kernel has not once run this    a disk or device does not answer: it is told, and after
    main thread, in one blocking call   PATIENCE times as long all end

each for NUM_ROUNDS rounds. The last is the kernel's own criterion of a hung task. A main thread
that hangs otherwise, in a deadlock or on a GPU, cannot be told from one that works: that is left to
the time limit of collectives (``DEEPSPEED_TIMEOUT``).
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gem_ds.distributed.comm import Comm, store_of_group

#: Seconds of silence after which a rank is lost.
DEFAULT_SECONDS = 90.0

NUM_ROUNDS = 10  # beats that a rank misses before it is lost
PATIENCE = 5  # so many times as long a disk may not answer

_LEFT = b"left"  # the last beat of a rank that has nothing more to do
_watches = itertools.count()  # the same on all ranks, which begin and end watches together


@contextmanager
def watching(comm: Comm, seconds: float) -> Iterator[None]:
    """While the block lasts, a rank that is silent for ``seconds`` ends all; 0 watches nobody.

    All ranks enter it together. The process ends with status 1 and without any clearing up, since
    its main thread may wait for the lost rank: what it was writing must be whole at any moment.
    """
    if comm.world_size == 1 or seconds == 0:
        yield
        return
    watch = _Watch(comm, seconds)
    watch.start()
    try:
        yield
    except BaseException:
        watch.stop(is_done=False)
        raise
    watch.stop(is_done=True)


class _Watch:
    """The threads of one rank, which outlive a main thread that waits for ever."""

    def __init__(self, comm: Comm, seconds: float) -> None:
        self.comm, self.seconds = comm, seconds
        self.interval = seconds / NUM_ROUNDS
        prefix = f"gem_ds/watch/{next(_watches)}"
        self.keys = [f"{prefix}/{rank}" for rank in range(comm.world_size)]
        self.verdict_key = f"{prefix}/verdict"
        self.store = store_of_group()
        self.name = f"{socket.gethostname()}, process {os.getpid()}"
        self.main_thread = threading.get_native_id()
        self.num_unanswered = 0  # rounds since the store has answered
        self.is_done, self.is_ending = False, False
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=f, daemon=True) for f in (self.beat, self.guard)]

    def start(self) -> None:
        """Begin, once all ranks have shown a first beat."""
        self.store.set(self.keys[self.comm.rank], f"0 {self.name}")
        self.comm.any(False)
        for thread in self.threads:
            thread.start()

    def stop(self, *, is_done: bool) -> None:
        """Beat no more; a rank that has not ``is_done`` with its work is one that others miss.

        Where all are about to end it does not return: what the main thread met on the way, such as
        a connection that another one has closed, is not what the user should read.
        """
        self.is_done = is_done
        self.stopping.set()
        for thread in self.threads:
            thread.join(None if self.is_ending else 1.0)

    def beat(self) -> None:
        """Show and look for signs of life, until this rank is done."""
        last, blocked = [b""] * len(self.keys), None
        num_silent, num_blocked = [0] * len(self.keys), 0
        for count in itertools.count(1):
            if self.stopping.wait(self.interval):
                break
            try:
                self.store.set(self.keys[self.comm.rank], f"{count} {self.name}")
                beats = self.store.multi_get(self.keys)
                if self.store.check([self.verdict_key]):
                    self.end()
            except RuntimeError:  # the store is not there: the guard counts
                continue
            self.num_unanswered = 0
            for rank, beat in enumerate(beats):
                is_alive = beat == _LEFT or beat != last[rank]
                num_silent[rank] = 0 if is_alive else num_silent[rank] + 1
            last = beats
            if lost := [rank for rank, rounds in enumerate(num_silent) if rounds >= NUM_ROUNDS]:
                self.judge(
                    f"{_ranks(lost, beats)} no sign of life for {self.seconds:g} seconds "
                    "(--watchdog_seconds): stopped, dead or cut off"
                )
            before, blocked = blocked, _blocking_call(self.main_thread)
            num_blocked = num_blocked + 1 if blocked is not None and blocked == before else 0
            self.judge_blocked(num_blocked)
        if self.is_done:
            with suppress(RuntimeError):
                self.store.set(self.keys[self.comm.rank], _LEFT)

    def judge_blocked(self, num_rounds: int) -> None:
        """Tell of a disk that does not answer, and in the end give it up."""
        what = f"rank {self.comm.rank} ({self.name}) has waited {num_rounds * self.interval:g}"
        what += " seconds for a disk or device that does not answer"
        if num_rounds == NUM_ROUNDS:
            _tell(f"Warning: {what}; after {PATIENCE * self.seconds:g} the run ends.")
        if num_rounds >= PATIENCE * NUM_ROUNDS:
            self.judge(what)

    def guard(self) -> None:
        """Look after the other thread, which may wait for a store whose keeper has stopped."""
        while not self.stopping.wait(self.interval):
            self.num_unanswered += 1
            if self.num_unanswered > NUM_ROUNDS:
                self.is_ending = True
                _tell(
                    f"Error: {_keeper()} has not answered rank {self.comm.rank} for "
                    f"{self.seconds:g} seconds (--watchdog_seconds): stopped, dead or cut off. "
                    f"{_CONSEQUENCE}"
                )
                self.end()

    def judge(self, what: str) -> None:
        """End all ranks; the first to say why tells it."""
        self.is_ending = True
        own = str(self.comm.rank)
        if self.store.compare_set(self.verdict_key, "", own) == own.encode():
            _tell(f"Error: {what}. {_CONSEQUENCE}")
        self.end()

    def end(self) -> None:
        """End this process, once the others have had the time to see why."""
        self.is_ending = True
        time.sleep(2 * self.interval)
        os._exit(1)


_CONSEQUENCE = (
    "The other ranks end; every file is whole, and training goes on from its last checkpoint with "
    "--resume_from_checkpoint last."
)


def _ranks(lost: list[int], beats: list[bytes]) -> str:
    """The lost ranks, by what their last beats say of them."""
    named = [f"{rank} ({beats[rank].decode().partition(' ')[2]})" for rank in lost]
    return f"rank {named[0]} has shown" if len(named) == 1 else f"ranks {', '.join(named)} show"


def _keeper() -> str:
    """Who keeps the store of the process group."""
    address = os.environ.get("MASTER_ADDR", "the first node")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return f"torchrun on {address}"
    return f"rank 0 on {address}"


def _blocking_call(thread: int) -> str | None:
    """What tells a call that cannot be interrupted from the next one; None outside of such a call.

    Of a thread of this process; None too where the system has no /proc.
    """
    try:
        text = Path(f"/proc/self/task/{thread}/status").read_text()
    except OSError:
        return None
    if "State:\tD" not in text:
        return None
    return "".join(line for line in text.splitlines() if "ctxt_switches" in line)


def _tell(sentence: str) -> None:
    with suppress(OSError, ValueError):
        print(sentence, file=sys.stderr, flush=True)
