"""A worker's server: a lean process that starts a judge for each program.

It is started by `exec`, and so holds nothing of its parent but three standard streams and the
control socket. It never reads a job: parent and children share those as files in memory. A judge
starts the candidate before it reads the tests, so a candidate has never passed through memory that
held a test, an expected value or another solution.

    parent (torch, the model)
      └─ server                receives (limits, files) on the control socket, enforces the limits
           └─ judge            starts the candidate, then reads the tests; reports to the server
                └─ candidate   reads the program, answers the judge
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence

from gem_ds.evaluate.sandbox import candidate, confine
from gem_ds.evaluate.sandbox.finder import show
from gem_ds.evaluate.sandbox.jails import JAILS, Jail
from gem_ds.evaluate.sandbox.judge import judge
from gem_ds.evaluate.sandbox.kernel import fork
from gem_ds.evaluate.sandbox.link import Channel
from gem_ds.evaluate.sandbox.wire import Decoder, Encoder

_NUM_FILES = 2  # of a job: what the candidate reads, what the judge reads
_PERIOD = 0.05  # seconds between two looks at the memory in use
_PATIENCE = struct.pack("ll", 0, 5000)  # struct timeval: until a judge looks what has ended
_LAST_GRACE = 0.1  # seconds that a candidate whose channel has closed gets to end by itself
_NAP = 0.002  # seconds between two looks whether it has
_JUDGE_MB = 2048
_DEATHS = {  # by exit code: its own, or that of a bubblewrap around it
    code: f", by {number.name}" for number in signal.Signals for code in (-number, 128 + number)
}
_PRELOADED = (  # what programs import most, as far as it is small: each page makes a fork dearer
    *("array", "bisect", "cmath", "collections", "copy", "functools", "heapq", "itertools"),
    *("math", "operator", "re", "string", "typing"),
)


def serve(
    descriptor: int, level: str, fresh: bool, processor: int, packages: Sequence[str] = ()
) -> None:
    """Serves until the parent closes the control socket, which is the open file `descriptor`.

    `packages` are paths of those that setups, tests and programs may import.

    A message is (timeout in seconds, memory_mb), with a job's open files; its answer is why the job
    ended, and the judge's report if there is one. One answer comes unasked, at first: the reason
    why the level cannot be had here, or an empty one.
    """
    control = socket.socket(fileno=descriptor)
    # What follows hands work to and fro, and never does two things at once: on one processor the
    # hand-over costs a third less.
    os.sched_setaffinity(0, {processor})
    os.setsid()  # a Ctrl-C is the parent's to handle
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no handler: see `_judge`
    try:
        jail = JAILS[level](fresh, packages)
    except OSError as error:
        control.send(Encoder().encode(str(error)))
        return
    show(jail.packages)
    for name in _PRELOADED:
        __import__(name)
    warm_up()
    control.send(Encoder().encode(""))
    gc.collect()
    gc.freeze()  # no child's collection shall copy these pages
    while True:
        message, files, _, _ = socket.recv_fds(control, 4096, _NUM_FILES)
        if not message:
            return
        timeout, memory_mb = Decoder().decode(message)
        control.send(Encoder().encode(_run(jail, control, files, timeout, memory_mb)))


def _run(
    jail: Jail, control: socket.socket, files: list[int], timeout: float, memory_mb: int
) -> tuple[str, bytes]:
    """Starts one judge, and returns when no process of the job is left."""
    deadline = time.monotonic() + timeout
    ours, theirs = socket.socketpair()
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        ours.setsockopt(socket.SOL_SOCKET, option, _PATIENCE)
    report, written = os.pipe()
    files = [*files, written]
    judge_pid = jail.start_judge(lambda: _judge(jail, files, ours, theirs, memory_mb))
    for file in (*files, ours.detach(), theirs.detach()):
        os.close(file)
    try:
        end = _watch(jail, control, judge_pid, deadline, memory_mb << 20)
    finally:
        os.kill(judge_pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
        os.waitpid(judge_pid, 0)
        jail.clear()
    with os.fdopen(report, "rb") as reports:
        return end, reports.read(2048)  # more than one takes


def _watch(
    jail: Jail, control: socket.socket, judge_pid: int, deadline: float, max_memory: int
) -> str:
    """Waits for the judge's end, or a reason to make one."""
    judge_end = os.pidfd_open(judge_pid)
    poller = select.poll()
    poller.register(judge_end, select.POLLIN)
    poller.register(control, select.POLLRDHUP)  # and not POLLIN: the next job may wait there
    try:
        while (remaining := deadline - time.monotonic()) > 0:
            events = dict(poller.poll(1000 * min(_PERIOD, remaining)))
            if control.fileno() in events:
                return "abandoned"  # by the parent, which has ended
            if judge_end in events:
                return "judged"
            if jail.processes.memory_of_descendants() > max_memory:
                return "memory"
        return "timeout"
    finally:
        os.close(judge_end)


def _judge(
    jail: Jail, files: list[int], ours: socket.socket, theirs: socket.socket, memory_mb: int
) -> None:
    """The judge's process.

    Now and then it waits for what has ended, so that it does not go on counting as a process. A
    handler of SIGCHLD could be called by anyone who may send the signal, in the midst of anything,
    and the first process of a pid namespace is deaf to signals from within only where it handles
    none. A thread would cost a twelfth of all speed.
    """
    job, tests, report = files
    confine.keep_only([*files, ours.fileno(), theirs.fileno()])
    candidate_pid = jail.start_candidate(job, theirs.fileno(), memory_mb)
    os.close(job)
    os.close(theirs.fileno())
    confine.limit_memory(_JUDGE_MB)
    exits: list[int] = []

    def reap() -> None:
        with contextlib.suppress(ChildProcessError):  # there is nothing left that could end
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                if ended[0] == candidate_pid:
                    exits.append(os.waitstatus_to_exitcode(ended[1]))
                    ours.shutdown(socket.SHUT_RDWR)  # what it leaves behind may hold it open

    channel = Channel(ours.fileno(), reap)
    arguments = Decoder().decode(os.pread(tests, os.fstat(tests).st_size, 0))
    status, detail, had_a_say = judge(channel, *arguments)
    if status == "crashed":
        last = time.monotonic() + _LAST_GRACE
        reap()
        while not exits and time.monotonic() < last:
            time.sleep(_NAP)
            reap()
        detail += _DEATHS.get(exits[0], "") if exits else ""
    os.write(report, Encoder().encode((status, detail, had_a_say)))


def warm_up() -> None:
    """Plays judge and then candidate in this process, with the other side in a fork of it.

    Python specializes code as it runs and remembers where it found attributes, and the linker
    binds a function when it is first called. A fork that does so for itself copies the pages that
    hold it; what the server has done, its forks do faster.
    """

    def as_judge(channel: Channel) -> None:
        tests = ("assert f([1, (2.5, 'a')]) == [1, (2.5, 'a')]",) * 16
        verdict = judge(channel, "", tests, ("f",), (), False)
        assert verdict == ("passed", "", False), verdict

    def as_candidate(channel: Channel) -> None:
        candidate.run(("", "def f(x): return x"), channel)

    _converse(as_judge, as_candidate)
    _converse(as_candidate, as_judge)
    del sys.modules[candidate.MODULE]


def _converse(here: Callable[[Channel], None], there: Callable[[Channel], None]) -> None:
    ours, theirs = socket.socketpair()

    def other_side() -> None:
        ours.close()
        there(Channel(theirs.fileno()))

    pid = fork(other_side)
    theirs.close()
    with ours:
        here(Channel(ours.fileno()))
    os.waitpid(pid, 0)
