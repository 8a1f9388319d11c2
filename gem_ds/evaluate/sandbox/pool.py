"""The caller's side: workers, and the order of jobs and verdicts.

The calling process may hold torch and a model: it never forks, it only starts one server per worker
(`server`) and passes it files. Each worker is given its next job while it is at one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import select
import socket
import subprocess
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from gem_ds.evaluate.sandbox.packages import paths_of
from gem_ds.evaluate.sandbox.program import Job, Program, SandboxUnavailableError, Verdict
from gem_ds.evaluate.sandbox.room import ENVIRONMENT, code_folder, command
from gem_ds.evaluate.sandbox.wire import Decoder, Encoder

LEVELS = ("bubblewrap", "namespaces", "landlock")  # the best first
WEAK_LEVELS = ("landlock",)
_PROBE = Program("def double(x): return 2 * x", ("assert double(4) == 8",), timeout=30.0)
_GRACE = 60.0  # seconds after a job's time in which its server must have answered
_AHEAD = 2  # jobs that a worker has at once
_MAX_OPEN = 256  # jobs between the one to yield next and the last one read


def check_program(
    program: str,
    tests: Sequence[str],
    *,
    setup: str = "",
    entry_point: str | None = None,
    timeout: float = 3.0,
    memory_mb: int = 1024,
    packages: Sequence[str] = (),
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
        packages: As of `Sandbox`.

    Raises:
        ValueError: A package is not installed.
        SandboxUnavailableError: No level with namespaces can be had here.
    """
    job = Program(program, tuple(tests), setup, entry_point, timeout, memory_mb)
    return next(_shared(tuple(packages)).check_all([job]))


@functools.cache
def _shared(packages: tuple[str, ...]) -> Sandbox:
    sandbox = Sandbox(num_workers=1, packages=packages)
    atexit.register(sandbox.close)
    return sandbox


class Sandbox(contextlib.AbstractContextManager["Sandbox"]):
    """A pool of workers; a context manager.

    Args:
        num_workers: Programs that run at the same time; at most one on each processor that this
            process may use, for two on one would take up each other's time.
        isolation: The level to use; by default the best that works here.
        allow_weak: Accept a level without namespaces if there is no better one.
        packages: What programs and tests may import beside the standard library: names of installed
            packages, whose requirements come with them.
        fresh: Start a fresh interpreter for each program, where the level could also fork one.

    Raises:
        SandboxUnavailableError: No level, or not the one asked for, works here.
        ValueError: A package is not installed, or cannot be imported in there.
    """

    def __init__(
        self,
        num_workers: int = 2,
        isolation: str | None = None,
        *,
        allow_weak: bool = False,
        packages: Sequence[str] = (),
        fresh: bool = False,
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, not {num_workers}.")
        if isolation is not None and isolation not in LEVELS:
            raise ValueError(f"isolation must be one of {', '.join(LEVELS)}, not {isolation!r}.")
        if isolation in WEAK_LEVELS and not allow_weak:
            raise SandboxUnavailableError(
                f"The isolation level {isolation!r} is weak: accept it by --allow-weak-sandbox."
            )
        paths = paths_of(packages)
        self.isolation = isolation or best_level(allow_weak)
        self._workers: list[_Worker] = []
        try:
            for number in range(min(num_workers, num_processors())):
                self._workers.append(_Worker(self.isolation, fresh, paths, number))
        except OSError as error:
            self.close()
            raise SandboxUnavailableError(
                f"The isolation level {self.isolation!r} does not work here: {error}."
            ) from error
        self._refuse_hidden(packages)

    def _refuse_hidden(self, packages: Sequence[str]) -> None:
        """Raise a ValueError if programs cannot import what they may: all would fail in silence."""
        test = ("assert f() is None",)
        probes = [Program(f"import {name}\ndef f(): pass", test, timeout=60) for name in packages]
        for name, verdict in zip(packages, list(self.check_all(probes)), strict=True):
            if verdict.status != "passed":
                self.close()
                raise ValueError(
                    f"--sandbox_packages {name} cannot be imported in the sandbox "
                    f"({verdict.detail}): leave it out."
                )

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers and all that runs in them."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def processes(self) -> list[int]:
        """The process of each worker's server."""
        return [worker.process.pid for worker in self._workers]

    def check_all(self, programs: Iterable[Program]) -> Iterator[Verdict]:
        """The verdicts on programs, in their order, each as soon as it and those before are there.

        `programs` is read as workers become free. One thread at a time may use a sandbox.
        """
        open_jobs: deque[Job] = deque()
        for program in itertools.chain(programs, [None]):
            if program is not None:
                open_jobs.append(Job(program, self.isolation))
                if open_jobs[-1].verdict is None:
                    self._idlest().submit(open_jobs[-1])
            while open_jobs:
                is_full = len(self._idlest().jobs) >= _AHEAD
                if (verdict := open_jobs[0].verdict) is not None:
                    open_jobs.popleft()
                    yield verdict
                elif program is None or is_full or len(open_jobs) == _MAX_OPEN:
                    self._collect()
                else:
                    break

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
                worker.process.kill()
            worker.collect()


class _Worker:
    """A server's process, and the jobs that it has."""

    def __init__(self, level: str, fresh: bool, packages: Sequence[str], number: int) -> None:
        processors = sorted(os.sched_getaffinity(0))  # another run beside this begins elsewhere
        processor = processors[(os.getpid() + number) % len(processors)]
        self._arguments = (level, fresh, processor, packages)
        self.jobs: deque[Job] = deque()
        self._start()

    def _start(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                command(code_folder(), "server", "serve", theirs.fileno(), *self._arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=ENVIRONMENT,
                cwd="/",
                pass_fds=[theirs.fileno()],
            )
        hello = self.control.recv(4096)
        problem = Decoder().decode(hello) if hello else "its server ended"
        if problem:
            self.close()
            raise OSError(problem)

    def submit(self, job: Job) -> None:
        """Gives the server a job, which it may start on later."""
        files = []
        for message in job.messages():
            files.append(os.memfd_create("job", os.MFD_CLOEXEC))
            os.write(files[-1], message)
        limits = Encoder().encode((job.program.timeout, job.program.memory_mb))
        with contextlib.suppress(OSError):  # if the server has ended, `collect` will see it
            socket.send_fds(self.control, [limits], files)
        for file in files:
            os.close(file)
        self.jobs.append(job)

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
        job.settle(*Decoder().decode(answer))
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

    def close(self) -> None:
        """Ends the server, and with it all that it started."""
        self.control.close()
        try:
            self.process.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def num_processors() -> int:
    """How many processors this process may use, and so the most workers of a sandbox."""
    return len(os.sched_getaffinity(0))


@functools.cache
def problem_of(level: str, fresh: bool = False) -> str | None:
    """Why a level cannot be had here, found by running a program in it; None if it can."""
    try:
        with Sandbox(1, level, allow_weak=True, fresh=fresh) as sandbox:
            (verdict,) = sandbox.check_all([_PROBE])
    except SandboxUnavailableError as error:
        return str(error.__cause__)
    return None if verdict.status == "passed" else f"{verdict.status}: {verdict.detail}"


def best_level(allow_weak: bool = False) -> str:
    """The best level that works here.

    Raises:
        SandboxUnavailableError: There is none, or only a weak one, which was not allowed.
    """
    reasons = []
    for level in LEVELS:
        if allow_weak or level not in WEAK_LEVELS:
            problem = problem_of(level)
            if problem is None:
                return level
            reasons.append(f"{level}: {problem}")
    weak = "" if allow_weak else ", or pass --allow-weak-sandbox for Landlock, which limits less"
    raise SandboxUnavailableError(
        f"No sandbox{'' if allow_weak else ' with namespaces'} works here ({'; '.join(reasons)}): "
        "install bubblewrap (apt-get install bubblewrap) or allow user namespaces (sysctl "
        f"user.max_user_namespaces){weak}."
    )
