"""The caller's side: workers, and the order of jobs and verdicts.

The calling process may hold torch and a model: it never forks, it only starts one server per worker
(`eval.sandbox.server`) and passes it files. Each worker is given its next job while it is at one.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType

from eval.sandbox.jails import ENVIRONMENT, PYTHON_FLAGS
from eval.sandbox.names import assign_roles
from eval.sandbox.room import code_folder, interpreter
from eval.sandbox.verdict import Program, SandboxUnavailableError, Status, Verdict
from eval.sandbox.wire import Decoder, Encoder

LEVELS = ("bubblewrap", "namespaces", "landlock")  # the best first
WEAK_LEVELS = ("landlock",)
_PROBE = Program("def double(x): return 2 * x", ("assert double(4) == 8",), timeout=30.0)
_AHEAD = 2  # jobs that a worker has at once
_MAX_OPEN = 256  # jobs between the one to yield next and the last one read
_GRACE = 60.0  # seconds after a job's time in which its server must have answered


def check_program(
    program: str,
    tests: Sequence[str],
    *,
    setup: str = "",
    entry_point: str | None = None,
    timeout: float = 3.0,
    memory_mb: int = 1024,
) -> Verdict:
    """Runs one program against its tests.

    Args:
        program: The candidate's source.
        tests: The source of each test, usually one `assert`. It never enters the jail.
        setup: Runs before the tests, and before the program too as far as the program needs it.
        entry_point: The function that the tests call; by default all names that setup and tests
            use and neither they nor Python define.
        timeout: Seconds of wall-clock time for all of it.
        memory_mb: Memory of each process of the program in MiB, and of all of them together.

    Raises:
        SandboxUnavailableError: No level with namespaces can be had here.
    """
    job = Program(program, tuple(tests), setup, entry_point, timeout, memory_mb)
    return next(_shared().check_all([job]))


@functools.cache
def _shared() -> Sandbox:
    sandbox = Sandbox(num_workers=1)
    atexit.register(sandbox.close)
    return sandbox


class Sandbox:
    """A pool of workers; a context manager.

    Args:
        num_workers: Programs that run at the same time.
        isolation: The level to use; by default the best that works here.
        allow_weak: Accept a level without namespaces if there is no better one.
        fresh: Start a fresh interpreter for each program, where the level could also fork one.

    Raises:
        SandboxUnavailableError: No level, or not the one asked for, works here.
    """

    def __init__(
        self,
        num_workers: int = 2,
        isolation: str | None = None,
        *,
        allow_weak: bool = False,
        fresh: bool = False,
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, not {num_workers}.")
        self.isolation = isolation or best_level(allow_weak)
        self._fresh = fresh
        self._workers: list[_Worker] = []
        try:
            for _ in range(num_workers):
                self._workers.append(_Worker(self.isolation, fresh))
        except OSError as error:
            self.close()
            raise SandboxUnavailableError(
                f"The isolation level {self.isolation!r} does not work here: {error}."
            ) from error

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers and all that runs in them."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def check_all(self, programs: Iterable[Program]) -> Iterator[Verdict]:
        """The verdicts on programs, in their order, each as soon as it and those before are there.

        `programs` is read as workers become free. One thread at a time may use a sandbox.
        """
        source = iter(programs)
        open_jobs: deque[_Job] = deque()
        is_exhausted = False
        while True:
            while not is_exhausted and len(open_jobs) < _MAX_OPEN and self._idlest().has_room:
                program = next(source, None)
                if program is None:
                    is_exhausted = True
                else:
                    open_jobs.append(_Job(program, self.isolation))
                    self._idlest().submit(open_jobs[-1])
            while open_jobs and open_jobs[0].verdict is not None:
                yield open_jobs.popleft().verdict
            if open_jobs:
                self._collect()
            elif is_exhausted:
                return

    def _idlest(self) -> _Worker:
        return min(self._workers, key=lambda worker: len(worker.jobs))

    def _collect(self) -> None:
        """Waits until a server answers, and settles what it answered."""
        busy = {worker.control.fileno(): worker for worker in self._workers if worker.jobs}
        poller = select.poll()
        for descriptor in busy:
            poller.register(descriptor, select.POLLIN)
        patience = _GRACE + max(worker.jobs[0].program.timeout for worker in busy.values())
        ready = [busy[descriptor] for descriptor, _ in poller.poll(1000 * patience)]
        for worker in ready or busy.values():
            if not ready:
                worker.kill()
            worker.collect()


class _Job:
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

    def settle(self, end: str, status: int, report: bytes) -> None:
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
            if state == "crashed" and status > 128:
                detail += f", by {signal.Signals(status - 128).name}"
            self._decide(state, detail, had_a_say)

    def _decide(self, status: Status, detail: str, had_a_say: bool = False) -> None:
        self.verdict = Verdict(status, self.isolation, detail, self.in_jail or had_a_say)


class _Worker:
    """A server and the jobs that it has."""

    def __init__(self, level: str, fresh: bool) -> None:
        self._level, self._fresh = level, fresh
        self.jobs: deque[_Job] = deque()
        self._reports: deque[int] = deque()
        self._start()

    @property
    def has_room(self) -> bool:
        return len(self.jobs) < _AHEAD

    def _start(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        source = f"import socket, sys; sys.path.append({code_folder()!r}); "
        source += "from eval.sandbox.server import serve; "
        source += f"serve(socket.socket(fileno={theirs.fileno()}), {self._level!r}, {self._fresh})"
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
        problem = json.loads(hello)["error"] if hello else "its server ended"
        if problem:
            self.close()
            raise OSError(problem)

    def submit(self, job: _Job) -> None:
        """Gives the server a job, which it may start on later."""
        files = [_file_of(message) for message in job.messages()]
        report, written = os.pipe()
        request = {"timeout": job.program.timeout, "memory_mb": job.program.memory_mb}
        try:
            socket.send_fds(self.control, [json.dumps(request).encode()], [*files, written])
        except OSError:
            pass  # the server has ended; `collect` will see it
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
            job.settle(**json.loads(answer), report=report.read())
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
                job.settle("judged", 0, b"")
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
            self._process.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _file_of(message: bytes) -> int:
    """An open file in memory that holds a message."""
    file = os.memfd_create("job", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(file), "wb") as stream:
        stream.write(message)
    return file


@functools.cache
def problem_of(level: str, fresh: bool = False) -> str | None:
    """Why a level cannot be had here, found by running a program in it; None if it can."""
    try:
        with Sandbox(1, level, fresh=fresh) as sandbox:
            (verdict,) = sandbox.check_all([_PROBE])
    except ValueError as error:
        return str(error)
    return None if verdict.status == "passed" else f"{verdict.status}: {verdict.detail}"


def best_level(allow_weak: bool = False) -> str:
    """The best level that works here.

    Raises:
        SandboxUnavailableError: There is none, or only a weak one, which was not allowed.
    """
    for level in LEVELS:
        if level in WEAK_LEVELS and not allow_weak:
            continue
        if problem_of(level) is None:
            return level
    raise SandboxUnavailableError(
        "No sandbox with namespaces works here: install bubblewrap (apt-get install bubblewrap), "
        "allow user namespaces (sysctl user.max_user_namespaces), or pass --allow-weak-sandbox for "
        "Landlock, which limits less."
    )
