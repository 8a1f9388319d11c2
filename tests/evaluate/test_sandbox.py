"""The sandbox's interface: verdicts and what they say, order, errors, workers that die."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gem_ds.evaluate import sandbox
from gem_ds.evaluate.sandbox import Program, Sandbox, SandboxUnavailableError, check_program, pool
from gem_ds.evaluate.sandbox.names import assign_roles
from gem_ds.evaluate.sandbox.pool import LEVELS, WEAK_LEVELS, best_level, problem_of

DOUBLE = "def double(x): return 2 * x"


def test_check_program() -> None:
    verdict = check_program(DOUBLE, ["assert double(4) == 8"])
    assert (verdict.status, verdict.detail, verdict.in_jail) == ("passed", "", False)
    assert verdict.isolation == best_level()
    assert verdict.isolation not in WEAK_LEVELS


@pytest.mark.parametrize(
    ("program", "tests", "status", "detail"),
    [
        (
            DOUBLE,
            ["assert double(4) == 8", "assert double(1) == 3"],
            "failed",
            "test 2: the assert",
        ),
        ("def double(x): return x['a']", ["double(1)"], "failed", "the program raised TypeError"),
        ("def double(x)", ["double(1)"], "failed", "the program: the program raised SyntaxError"),
        ("import os; os.abort()", ["double(1)"], "crashed", "during the program, by SIGABRT"),
        ("import os\ndef double(x): os._exit(3)", ["double(1)"], "crashed", "during test 1"),
        ("def double(x): return bytes(1 << 40)", ["double(1)"], "crashed", "MemoryError"),
        ("while True: pass", ["double(1)"], "timeout", "not done after 0.5 s"),
        ("def double(x): return b'x' * (20 << 20)", ["double(1)"], "failed", "more than 16 MiB"),
    ],
)
def test_the_detail_says_what_happened(
    program: str, tests: list[str], status: str, detail: str
) -> None:
    timeout = 0.5 if status == "timeout" else 10.0
    verdict = check_program(program, tests, timeout=timeout)
    assert verdict.status == status
    assert detail in verdict.detail


def test_memory_is_bounded_for_all_processes_together() -> None:
    """Each alone stays below the limit, so that only their sum can be what ends them."""
    program = (
        "import os, time\n"
        "def f():\n"
        "    for _ in range(3): os.fork()\n"
        "    data = b'x' * (50 << 20)\n"
        "    time.sleep(5)"
    )
    verdict = check_program(program, ["f()"], timeout=10.0, memory_mb=200)
    assert verdict.status == "crashed"
    assert "200 MiB" in verdict.detail


def test_memory_of_what_a_thread_starts_counts_too() -> None:
    program = (
        "import os, threading, time\n"
        "def hold():\n"
        "    for _ in range(3):\n"
        "        if os.fork() == 0:\n"
        "            data = b'x' * (80 << 20)\n"
        "            time.sleep(5)\n"
        "    time.sleep(5)\n"
        "def f():\n"
        "    thread = threading.Thread(target=hold)\n"
        "    thread.start()\n"
        "    thread.join()"
    )
    verdict = check_program(program, ["f()"], timeout=10.0, memory_mb=200)
    assert verdict.status == "crashed"
    assert "200 MiB" in verdict.detail


def test_the_time_is_wall_clock_time() -> None:
    started = time.monotonic()
    assert check_program("import time; time.sleep(60)", [], timeout=0.5).status == "timeout"
    assert time.monotonic() - started < 10


def test_a_program_without_tests_passes_if_it_runs() -> None:
    assert check_program("x = 1", []).status == "passed"
    assert check_program("x = 1 / 0", []).status == "failed"


def test_only_the_candidates_own_code_gets_a_say() -> None:
    own = "class P:\n    def __eq__(self, other): return True\ndef f(): return P()"
    assert check_program(own, ["assert f() == P()"]).in_jail
    assert not check_program(own, ["assert f() != 1"]).in_jail
    assert check_program("def f(x): return x\ndef g(x): return x", ["assert f(1) == g(1)"]).in_jail


def test_the_tests_run_whole_in_the_jail_where_their_values_cannot_be_sent() -> None:
    setup = "class Node:\n    def __init__(self, value): self.value = value"
    verdict = check_program("def f(n): return n.value", ["assert f(Node(3)) == 3"], setup=setup)
    assert (verdict.status, verdict.in_jail) == ("passed", True)
    verdict = check_program("def f(n): return 0", ["assert f(Node(3)) == 3"], setup=setup)
    assert (verdict.status, verdict.in_jail) == ("failed", True)


def test_entry_point() -> None:
    """A name of the setup's is the candidate's if the caller says so."""
    setup = "def double(x): raise NotImplementedError"
    tests = ["assert double(4) == 8"]
    assert check_program(DOUBLE, tests, setup=setup).status == "failed"
    assert check_program(DOUBLE, tests, setup=setup, entry_point="double").status == "passed"


def test_verdicts_come_in_order_and_programs_are_read_as_they_are_needed() -> None:
    read = []

    def programs():
        for number in range(400):
            read.append(number)
            delay = "import time; time.sleep(0.3)" if number == 0 else ""
            expected = number if number % 3 else -1
            yield Program(
                f"{delay}\ndef f(): return {number}", (f"assert f() == {expected}",), timeout=30.0
            )

    with Sandbox(2) as pool_of_two:
        verdicts = pool_of_two.check_all(programs())
        first = next(verdicts)
        assert len(read) < 400
        statuses = [first.status, *(verdict.status for verdict in verdicts)]
    assert statuses == ["passed" if number % 3 else "failed" for number in range(400)]


def test_a_server_that_dies_is_replaced() -> None:
    with Sandbox(1) as lonely:
        (before,) = lonely.processes()
        slow = Program("import time; time.sleep(0.2)\n" + DOUBLE, ("assert double(1) == 2",))
        verdicts = lonely.check_all([slow, slow, slow])
        assert next(verdicts).status == "passed"
        os.kill(before, signal.SIGKILL)
        assert [verdict.status for verdict in verdicts] == ["passed", "passed"]
        assert lonely.processes() != [before]


def test_nothing_outlives_a_caller_that_is_killed(tmp_path: Path) -> None:
    script = (
        "from gem_ds.evaluate.sandbox import Program, Sandbox\n"
        "sandbox = Sandbox(1)\n"
        "print(*sandbox.processes(), flush=True)\n"
        "list(sandbox.check_all([Program('import time; time.sleep(60)', (), timeout=60)]))"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert caller.stdout is not None
    with caller.stdout:
        server = int(caller.stdout.readline())
    time.sleep(0.3)
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{server}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{server}").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout": 0}, "timeout must be a positive number of seconds, not 0."),
        ({"timeout": float("nan")}, "timeout must be a positive number"),
        ({"memory_mb": 5}, "memory_mb must be at least 64"),
    ],
)
def test_bad_limits(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_program(DOUBLE, [], **arguments)


def test_bad_levels() -> None:
    with pytest.raises(ValueError, match="isolation must be one of bubblewrap, namespaces"):
        Sandbox(isolation="chroot")
    with pytest.raises(ValueError, match="num_workers must be at least 1, not 0"):
        Sandbox(0)
    with pytest.raises(SandboxUnavailableError, match="'landlock' is weak"):
        Sandbox(isolation="landlock")


def test_no_two_workers_share_a_processor(monkeypatch) -> None:
    """Programs on one processor would take each other's time, and time out falsely."""
    processors: list[int] = []
    monkeypatch.setattr(
        pool, "Worker", lambda level, fresh, number: processors.append(number) or Closed()
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5})
    with Sandbox(7, "namespaces"):
        assert processors == [0, 1, 2]
    with Sandbox(2, "namespaces"):
        assert processors == [0, 1, 2, 0, 1]


class Closed:
    """A worker that has nothing to close."""

    def close(self) -> None:
        pass


def test_no_level_is_one_sentence_and_weak_ones_must_be_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(
        pool, "problem_of", lambda level, fresh=False: None if level in WEAK_LEVELS else "no"
    )
    with pytest.raises(SandboxUnavailableError) as refused:
        Sandbox()
    text = str(refused.value)
    assert all(
        hint in text for hint in ("bubblewrap", "max_user_namespaces", "--allow-weak-sandbox")
    )
    assert text.count(". ") == 0
    assert best_level(allow_weak=True) == "landlock"


@pytest.mark.parametrize("allow_weak", [False, True])
def test_where_no_level_works_each_one_says_why(monkeypatch, allow_weak: bool) -> None:
    monkeypatch.setattr(
        pool,
        "problem_of",
        lambda level, fresh=False: f"The isolation level 'x' does not work here: no {level} today.",
    )
    with pytest.raises(SandboxUnavailableError) as refused:
        best_level(allow_weak)
    text = str(refused.value)
    levels = [level for level in LEVELS if allow_weak or level not in WEAK_LEVELS]
    assert f"({'; '.join(f'{level}: no {level} today' for level in levels)})" in text
    assert ("--allow-weak-sandbox" in text) != allow_weak, "what was passed is no advice"
    assert text.count(". ") == 0


def as_ordinary_user(program: str) -> str:
    """What a program prints that runs as a user with one number, in an interpreter of his own."""
    become = """
import os, sys
from gem_ds.evaluate.sandbox import Program, Sandbox, room
from gem_ds.evaluate.sandbox.identity import lend
if os.geteuid() == 0:
    sys.executable = room.interpreter()
    lend(list(room.sources()))
    os.setgroups([])
    os.setresgid(*[54321] * 3)
    os.setresuid(*[54321] * 3)
"""
    done = subprocess.run(
        [sys.executable, "-c", become + program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("level", LEVELS)
def test_the_users_own_threads_are_none_of_a_candidates_processes(level: str) -> None:
    """An ordinary user's candidates count with all that he runs; he may run a lot."""
    if problem := problem_of(level):
        pytest.skip(f"{level}: {problem}")
    program = f"""
import threading, time
for _ in range(200):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
forks = '''
import os, time
def f():
    for n in range(1000):
        try:
            if os.fork() == 0: time.sleep(60)
        except OSError:
            return n
'''
storm = '''
import os
def f():
    while True:
        try: os.fork()
        except OSError: pass
'''
with Sandbox(1, {level!r}, allow_weak=True) as sandbox:
    jobs = [Program(forks, ("assert 90 < f() < 140",)), Program(storm, ("f()",), timeout=1.0)] * 2
    print(*[verdict.status for verdict in sandbox.check_all(jobs)], flush=True)
os._exit(0)
"""
    assert as_ordinary_user(program).split() == ["passed", "timeout"] * 2


def test_no_limit_is_raised_above_the_hard_one() -> None:
    program = """
import resource
from gem_ds.evaluate.sandbox import confine
resource.setrlimit(resource.RLIMIT_NPROC, (4000, 4000))
for others in (300, 30_000, 10):
    confine.prepare(others)
    print(*resource.getrlimit(resource.RLIMIT_NPROC))
"""
    assert as_ordinary_user(program).split() == ["428", "428", "428", "428", "138", "138"]


def test_unavailable_levels_say_why() -> None:
    for level in LEVELS:
        problem = problem_of(level)
        assert problem is None or "does not work here: " in problem


def test_the_package_stays_lean() -> None:
    """Server and candidate import it; what it loads makes each fork and each start dearer."""
    heavy = {"torch", "numpy", "importlib.metadata", "dataclasses", "inspect"}
    for module, dear in (
        ("candidate", heavy | {"typing", "socket", "re", "ctypes"}),
        ("server", heavy),
    ):
        script = f"import sys, gem_ds.evaluate.sandbox.{module}; print(*sys.modules)"
        output = subprocess.run(
            [sys.executable, "-S", "-c", script],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        ).stdout.split()
        assert not dear & set(output), module
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        sandbox.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("program", "tests", "setup", "candidate", "modules"),
    [
        ("def f(): 1", ["assert f(1) == len([1])"], "", ["f"], []),
        ("def f(): 1\ndef abs(x): 0", ["assert abs(f(1)) == 1"], "", ["f"], []),
        ("def sum(): 1", ["assert sum(1) == 1"], "", ["sum"], []),
        ("import sys\ndef f(): 1", ["assert f(1) == sys.maxsize"], "", ["f"], ["sys"]),
        ("sys = 1\ndef f(): 1", ["assert f(1) == sys.maxsize"], "", ["f", "sys"], []),
        ("def math(): 1", ["assert math.floor(g(1)) == 1"], "import math", ["g"], []),
        ("def f(", ["x = f(1)", "assert x == 1"], "", ["f"], []),
        ("class N: 1", ["assert f(root)"], "root = N(1)", ["N", "f"], []),
        ("", ["assert all(f(i) == i for i in range(3))"], "", ["f"], []),
        ("", ["def check(g):\n    assert g(1) == 1", "check(f)"], "", ["f"], []),
    ],
)
def test_roles(program, tests, setup, candidate, modules) -> None:
    roles = assign_roles(program, tests, setup=setup)
    assert (list(roles.candidate), list(roles.modules)) == (candidate, modules)


def test_a_setup_is_shared_no_further_than_the_program_needs() -> None:
    setup = "import sys\nsys.setrecursionlimit(5000)\nMOD = 7\nBASE = MOD\nEXPECTED = 3\nprint(MOD)"
    roles = assign_roles("def f(x): return x", ["assert f(3) == EXPECTED"], setup=setup)
    assert roles.program_setup == "import sys\nsys.setrecursionlimit(5000)"
    assert not roles.shares_setup
    roles = assign_roles("def f(x): return x % BASE", ["assert f(3) == EXPECTED"], setup=setup)
    assert roles.program_setup.splitlines()[2:] == ["MOD = 7", "BASE = MOD"]
    assert roles.shares_setup


def test_a_field_that_is_called_has_a_say() -> None:
    program = (
        "from collections import namedtuple\n"
        "def f(): return namedtuple('A', 'issubset')(lambda other: True)"
    )
    verdict = check_program(program, ["assert f().issubset({1})"])
    assert (verdict.status, verdict.in_jail) == ("passed", True)


@pytest.mark.parametrize(
    ("value", "setup"),
    [
        ("array.array('i', [3])", "import array"),
        ("pathlib.PurePosixPath('a/b')", "import pathlib"),
    ],
)
def test_values_of_the_tests_that_are_not_plain_are_compared_in_the_jail(
    value: str, setup: str
) -> None:
    program = f"{setup}\ndef f(): return {value}"
    verdict = check_program(program, [f"assert f() == {value}"], setup=setup)
    assert (verdict.status, verdict.in_jail) == ("passed", True)
    assert check_program("def f(): return 3", [f"assert f() == {value}"], setup=setup).status == (
        "failed"
    )


@pytest.mark.parametrize(
    ("right", "test"),
    [
        ("print", "assert callable(f())"),
        ("iter(())", "assert hasattr(f(), '__next__')"),
        ("iter(())", "import collections.abc\nassert isinstance(f(), collections.abc.Iterator)"),
    ],
)
def test_what_kind_of_object_it_is_is_decided_where_the_object_is(right: str, test: str) -> None:
    assert check_program("def f(): return object()", [test]).status == "failed"
    assert check_program(f"def f(): return {right}", [test]).status == "passed"


@pytest.mark.parametrize(
    ("program", "test"),
    [
        (
            "def f(fn, xs):\n    y = [1]\n    return fn(y, y)",
            "f(lambda a, b: a + b, [7]) == [1, 1]",
        ),
        ("import sys\nsys.setrecursionlimit(2**31 - 1)\ndef f(): return 1", "f() == 1"),
        (
            "class V:\n    def __init__(self, n): self.n = n\n"
            "    def __neg__(self): return -self.n\n"
            "    def __and__(self, other): return self.n & other.n",
            "-V(2) == -2 and V(6) & V(3) == 2",
        ),
    ],
)
def test_honest_programs_that_were_judged_wrongly_once(program: str, test: str) -> None:
    assert check_program(program, [f"assert {test}"]).status == "passed"


def test_a_program_that_is_too_large_fails() -> None:
    verdict = check_program("x = '" + "a" * (17 << 20) + "'", ["assert x"])
    assert (verdict.status, verdict.detail) == (
        "failed",
        "program and tests together are larger than 3 MiB",
    )


def test_a_sandbox_may_be_used_after_verdicts_were_left_behind() -> None:
    program = Program("def f(): return 1", ("assert f() == 1",))
    with Sandbox(1) as sandbox:
        verdicts = sandbox.check_all([program] * 6)
        next(verdicts)
        verdicts.close()  # type: ignore[attr-defined]
        assert [v.status for v in sandbox.check_all([program] * 2)] == ["passed"] * 2


def test_the_warning_filter_does_not_decide_what_a_program_imports() -> None:
    program = "import math, re\ndef f(x): return re.sub('\\d', '', x)"
    verdict = check_program(program, ["assert f('a1') == 'a' and math.pi > 3"])
    assert (verdict.status, verdict.in_jail) == ("passed", False)


def test_descriptors_above_a_lowered_limit_are_closed_too() -> None:
    program = """
import os, resource
from gem_ds.evaluate.sandbox.confine import keep_only
low, high = os.dup(0), os.dup2(0, 900)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
keep_only([low])
os.fstat(low)
try:
    os.fstat(high)
except OSError:
    print("closed")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "closed\n", done.stderr
