"""A worker's server: a lean process that starts a jail and a judge for each program.

It is started by `exec`, so it holds nothing of its parent but three standard streams and the
control socket. It never reads a job: parent and children share those as files in memory, and a
candidate's process descends from the server without having passed through any memory that held
a test, an expected value or another solution.

    parent (torch, the model)
      └─ server                     receives (limits, files) on the control socket, enforces time
           ├─ judge                 reads the tests, then the jail's answers; reports to the parent
           └─ jail: pid 1           opens the cell, waits
                └─ candidate        reads the program
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import time

from eval.sandbox import confine, jails, processes
from eval.sandbox.judge import judge
from eval.sandbox.wire import Channel, Decoder, Encoder

NUM_FILES = 3  # of a job: what the jail reads, what the judge reads, where the judge reports
_PERIOD = 0.05  # seconds between two looks at the memory in use
_LAST_GRACE = 0.1  # seconds that a jail gets to end by itself when all is judged
_JUDGE_MB = 2048
_PRELOADED = (  # what programs import most, as far as it is small: each page makes a fork dearer
    *("array", "bisect", "cmath", "collections", "copy", "functools", "heapq", "itertools"),
    *("math", "operator", "re", "string", "typing"),
)


def serve(control: socket.socket, level: str, fresh: bool, processor: int) -> None:
    """Serves until the parent closes the control socket.

    A message, in the encoding of `eval.sandbox.wire`, is (timeout in seconds, memory_mb), with
    NUM_FILES open files; its answer is (why it ended, the jail's exit status). One answer comes
    unasked, at first: the reason why the level cannot be had here, or an empty one.
    """
    # What follows hands work to and fro, and never does two things at once: on one processor the
    # hand-over costs a third less.
    os.sched_setaffinity(0, {processor})
    os.setsid()  # a Ctrl-C is the parent's to handle
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        jail = jails.JAILS[level](fresh)
    except OSError as error:
        control.send(Encoder().encode(str(error)))
        return
    for name in _PRELOADED:
        __import__(name)
    control.send(Encoder().encode(""))
    gc.collect()
    gc.freeze()  # no child's collection shall copy these pages
    while True:
        message, files, _, _ = socket.recv_fds(control, 4096, NUM_FILES)
        if not message:
            return
        timeout, memory_mb = Decoder().decode(message)
        outcome = _run(jail, control, files, timeout, memory_mb)
        control.send(Encoder().encode(outcome))


def _run(
    jail: jails.Jail, control: socket.socket, files: list[int], timeout: float, memory_mb: int
) -> tuple[str, int]:
    """Starts one jail and one judge, and returns when no process of either is left."""
    deadline = time.monotonic() + timeout
    job, tests, report = files
    judges, candidates = socket.socketpair()
    judge_pid = processes.fork(lambda: _judge(jail, tests, report, judges.detach()))
    jail_pid = jail.start(job, candidates.fileno(), memory_mb)
    judges.close()
    candidates.close()
    for file in files:
        os.close(file)
    try:
        end = _watch(jail, control, (judge_pid, jail_pid), deadline, memory_mb << 20)
    finally:
        os.kill(jail_pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
        _, status = os.waitpid(jail_pid, 0)
        jail.clear([judge_pid])
        os.kill(judge_pid, signal.SIGKILL)
        os.waitpid(judge_pid, 0)
    return end, os.waitstatus_to_exitcode(status)


def _watch(
    jail: jails.Jail,
    control: socket.socket,
    pids: tuple[int, int],
    deadline: float,
    max_memory: int,
) -> str:
    """Waits for the judge's end, or a reason to make one."""
    judge_end, jail_end = map(os.pidfd_open, pids)
    poller = select.poll()
    poller.register(judge_end, select.POLLIN)
    poller.register(jail_end, select.POLLIN)
    poller.register(control, select.POLLRDHUP)  # and not POLLIN: the next job may wait there
    try:
        while (remaining := deadline - time.monotonic()) > 0:
            events = dict(poller.poll(1000 * min(_PERIOD, remaining)))
            if control.fileno() in events:
                return "abandoned"  # by the parent, which has ended
            if judge_end in events:
                _grant_an_end(jail_end)
                return "judged"
            if jail_end in events:
                poller.unregister(jail_end)
                jail.clear(pids)  # of what holds the channel open and lets the judge wait
            elif jail.memory_in_use() > max_memory:
                return "memory"
        return "timeout"
    finally:
        os.close(judge_end)
        os.close(jail_end)


def _grant_an_end(process: int) -> None:
    """Lets an open process that has closed its channel end by itself: its status tells how."""
    poller = select.poll()
    poller.register(process, select.POLLIN)
    poller.poll(1000 * _LAST_GRACE)


def _judge(jail: jails.Jail, job: int, report: int, channel: int) -> None:
    """The judge's process."""
    confine.keep_only([job, report, channel])
    confine.limit_memory(_JUDGE_MB)
    confine.drop_privileges(jail.judge_identity)
    jail.seccomp_filter.install()
    arguments = Decoder().decode(os.pread(job, os.fstat(job).st_size, 0))
    verdict = judge(Channel(channel), *arguments)
    os.write(report, Encoder().encode(verdict))
