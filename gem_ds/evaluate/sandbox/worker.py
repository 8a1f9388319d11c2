"""The caller's end of a worker: its server's process and the jobs that it has."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections import deque

from gem_ds.evaluate.sandbox.jails import ENVIRONMENT, PYTHON_FLAGS
from gem_ds.evaluate.sandbox.names import assign_roles
from gem_ds.evaluate.sandbox.room import code_folder, interpreter
from gem_ds.evaluate.sandbox.verdict import Program, Status, Verdict
from gem_ds.evaluate.sandbox.wire import Decoder, Encoder

GRACE = 60.0  # seconds after a job's time in which its server must have answered
_AHEAD = 2  # jobs that a worker has at once
_MAX_SOURCE = 3 << 20  # characters of a job: fewer bytes than a message may have


class Job:
    """One program on its way."""

    def __init__(self, program: Program, isolation: str) -> None:
        self.program = program
        self.isolation = isolation
        self.verdict: Verdict | None = None
        self.num_lost = 0  # servers that ended over it
        self.roles = assign_roles(
            program.program, program.tests, setup=program.setup, entry_point=program.entry_point
        )
        self.in_jail = self.roles.in_jail
        if sum(map(len, (program.program, program.setup, *program.tests))) > _MAX_SOURCE:
            self._decide("failed", "program and tests together are larger than 3 MiB")

    def messages(self) -> tuple[bytes, bytes]:
        """What the jail reads and what the judge reads."""
        program, roles, tests = self.program, self.roles, self.program.tests
        if not self.in_jail:
            for_jail: tuple[str, ...] = (roles.program_setup, program.program)
            for_judge = (program.setup, tests, roles.candidate, roles.modules, roles.shares_setup)
        else:
            sources = (program.setup, program.program)
            for_jail = (*(sources[::-1] if roles.setup_is_last else sources), *tests)
            for_judge = ("", (), (), (), True)
        return Encoder().encode(for_jail), Encoder().encode(for_judge)

    def settle(self, end: str, report: bytes) -> None:
        """Makes a verdict of the server's answer and the judge's report, if there can be one."""
        program = self.program
        if end == "timeout":
            self._decide("timeout", f"not done after {program.timeout:g} s")
        elif end == "memory":
            self._decide("crashed", f"its processes took more than {program.memory_mb} MiB")
        elif not report:
            self._decide("crashed", "its answers could not be judged")
        else:
            state, detail, had_a_say = Decoder().decode(report)
            if state == "in_jail":
                self.in_jail = True
                return
            self._decide(state, detail, had_a_say)

    def _decide(self, status: Status, detail: str, had_a_say: bool = False) -> None:
        self.verdict = Verdict(status, self.isolation, detail, self.in_jail or had_a_say)


class Worker:
    """A server and the jobs that it has."""

    def __init__(self, level: str, fresh: bool, number: int) -> None:
        processors = sorted(os.sched_getaffinity(0))  # another run beside this begins elsewhere
        self._arguments = (level, fresh, processors[(os.getpid() + number) % len(processors)])
        self.jobs: deque[Job] = deque()
        self._reports: deque[int] = deque()
        self._start()

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    @property
    def has_room(self) -> bool:
        """Whether it can be given another job now."""
        return len(self.jobs) < _AHEAD

    def _start(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        source = f"import socket, sys; sys.path.append({code_folder()!r}); "
        source += "from gem_ds.evaluate.sandbox.server import serve; sys.path.pop(); "
        source += f"serve(socket.socket(fileno={theirs.fileno()}), *{self._arguments})"
        self._process = subprocess.Popen(
            [interpreter(), *PYTHON_FLAGS, "-c", source],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            cwd="/",
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        hello = self.control.recv(4096)
        problem = Decoder().decode(hello) if hello else "its server ended"
        if problem:
            self.close()
            raise OSError(problem)

    def submit(self, job: Job) -> None:
        """Gives the server a job, which it may start on later."""
        files = [_file_of(message) for message in job.messages()]
        report, written = os.pipe()
        limits = Encoder().encode((job.program.timeout, job.program.memory_mb))
        with contextlib.suppress(OSError):  # if the server has ended, `collect` will see it
            socket.send_fds(self.control, [limits], [*files, written])
        for file in (*files, written):
            os.close(file)
        self.jobs.append(job)
        self._reports.append(report)

    def collect(self) -> None:
        """Settles the oldest job by the server's answer, or starts anew where there is none."""
        try:
            answer = self.control.recv(4096)
        except OSError:
            answer = b""
        if not answer:
            self._recover()
            return
        job = self.jobs.popleft()
        with os.fdopen(self._reports.popleft(), "rb") as report:
            job.settle(Decoder().decode(answer), report.read())
        if job.verdict is None:
            self.submit(job)

    def _recover(self) -> None:
        """Replaces a server that ended; the job that it was at gets one more try."""
        self.close()
        jobs, self.jobs = self.jobs, deque()
        jobs[0].num_lost += 1
        self._start()
        for job in jobs:
            if job.num_lost > 1:
                job.settle("judged", b"")
            else:
                self.submit(job)

    def kill(self) -> None:
        """Ends the server at once."""
        self._process.kill()

    def close(self) -> None:
        """Ends the server, and with it all that it started."""
        self.control.close()
        while self._reports:
            os.close(self._reports.popleft())
        try:
            self._process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _file_of(message: bytes) -> int:
    """An open file in memory that holds a message."""
    file = os.memfd_create("job", os.MFD_CLOEXEC)
    os.write(file, message)
    return file
