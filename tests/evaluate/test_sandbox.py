"""The sandbox's interface: verdicts and what they say, order, errors, workers that die."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from unittest import mock

import pytest

from gem_ds.evaluate import sandbox
from gem_ds.evaluate.sandbox import (
    Program,
    Sandbox,
    SandboxUnavailableError,
    check_program,
    pool,
    system_calls,
)
from gem_ds.evaluate.sandbox.pool import LEVELS, WEAK_LEVELS, best_level, problem_of
from gem_ds.evaluate.sandbox.program import assign_roles
from tests.tiny_evaluation import REFUSED

REPOSITORY = Path(__file__).parents[2]
DOUBLE = "def double(x): return 2 * x"
STAND_INS = tomllib.loads(Path(__file__).with_name("stand_ins.toml").read_text())
VERDICTS = tomllib.loads(Path(__file__).with_name("sandbox_verdicts.toml").read_text())
ROLES = VERDICTS.pop("roles")


# Verdicts


def test_check_program():
    verdict = check_program(DOUBLE, ["assert double(4) == 8"])
    assert (verdict.status, verdict.detail, verdict.in_jail) == ("passed", "", False)
    assert verdict.isolation == best_level()
    assert verdict.isolation not in WEAK_LEVELS
    assert check_program("x = 1", []).status == "passed", "it ran, and nothing more was asked"
    assert check_program("x = 1 / 0", []).status == "failed"


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdict_on_a_table(name):
    case = dict(VERDICTS[name])
    program = case.pop("program", DOUBLE).replace("{long}", "a" * (17 << 20))
    limits = {"setup": case.pop("setup", ""), "timeout": case.pop("timeout", 10.0)}
    verdict = check_program(program, case.pop("tests"), **limits)
    assert case.pop("detail", "") in verdict.detail
    assert {field: getattr(verdict, field) for field in case} == case, verdict


def test_no_function_of_the_tests_poses_as_a_method():
    """As a method of what should be text, it would be asked what only text can answer."""
    program = (
        "from collections import namedtuple\ndef f(g): return namedtuple('T', 'startswith')(g)"
    )
    verdict = check_program(program, ["assert f(lambda text: 'b' in text).startswith('zebra')"])
    assert verdict.status == "failed"
    assert "pose as a method" in verdict.detail


def test_entry_point():
    """A name of the setup's is the candidate's if the caller says so."""
    setup = "def double(x): raise NotImplementedError"
    tests = ["assert double(4) == 8"]
    assert check_program(DOUBLE, tests, setup=setup).status == "failed"
    assert check_program(DOUBLE, tests, setup=setup, entry_point="double").status == "passed"


def test_memory_is_bounded_for_all_processes_together():
    """Each, and all direct children together, stay below the limit; a thread starts them."""
    verdict = check_program(STAND_INS["hoard"], ["f()"], timeout=10.0, memory_mb=200)
    assert verdict.status == "crashed"
    assert "200 MiB" in verdict.detail


# Who defines which names


@pytest.mark.parametrize(("program", "tests", "setup", "candidate", "modules"), ROLES)
def test_roles(program, tests, setup, candidate, modules):
    roles = assign_roles(Program(program, tuple(tests), setup))
    assert (list(roles.candidate), list(roles.modules)) == (candidate, modules)


def test_a_setup_is_shared_no_further_than_the_program_needs():
    setup = "import sys\nsys.setrecursionlimit(5000)\nMOD = 7\nBASE = MOD\nEXPECTED = 3\nprint(MOD)"
    tests = ("assert f(3) == EXPECTED",)
    roles = assign_roles(Program("def f(x): return x", tests, setup))
    assert roles.program_setup == "import sys\nsys.setrecursionlimit(5000)"
    assert not roles.shares_setup
    roles = assign_roles(Program("def f(x): return x % BASE", tests, setup))
    assert roles.program_setup.splitlines()[2:] == ["MOD = 7", "BASE = MOD"]
    assert roles.shares_setup


# Workers


def test_verdicts_come_in_order_and_programs_are_read_as_they_are_needed():
    read = []

    def programs():
        for number in range(300):
            read.append(number)
            delay = "import time; time.sleep(0.3)" if number == 0 else ""
            test = f"assert f() == {number if number % 3 else -1}"
            yield Program(f"{delay}\ndef f(): return {number}", (test,), timeout=30.0)

    with Sandbox(2) as pool_of_two:
        verdicts = pool_of_two.check_all(programs())
        first = next(verdicts)
        assert len(read) < 300
        statuses = [first.status, *(verdict.status for verdict in verdicts)]
    assert statuses == ["passed" if number % 3 else "failed" for number in range(300)]


def test_a_sandbox_goes_on_after_verdicts_were_left_and_after_its_server_died():
    with Sandbox(1) as lonely:
        (before,) = lonely.processes()
        slow = Program("import time; time.sleep(0.2)\n" + DOUBLE, ("assert double(1) == 2",))
        verdicts = lonely.check_all([slow] * 6)
        next(verdicts)
        verdicts.close()  # type: ignore[attr-defined]
        verdicts = lonely.check_all([slow, slow, slow])
        assert next(verdicts).status == "passed"
        os.kill(before, signal.SIGKILL)
        assert [verdict.status for verdict in verdicts] == ["passed", "passed"]
        assert lonely.processes() != [before]


def test_nothing_outlives_a_caller_that_is_killed():
    script = """
from gem_ds.evaluate.sandbox import Program, Sandbox
sandbox = Sandbox(1)
print(*sandbox.processes(), flush=True)
list(sandbox.check_all([Program('import time; time.sleep(60)', (), timeout=60)]))
"""
    command = [sys.executable, "-c", script]
    caller = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY)
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


def test_no_two_workers_share_a_processor(monkeypatch):
    """Programs on one processor would take each other's time, and time out falsely."""
    worker = mock.Mock()
    monkeypatch.setattr(pool, "_Worker", worker)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5})
    for num_workers, expected in ((7, [0, 1, 2]), (2, [0, 1])):
        worker.reset_mock()
        with Sandbox(num_workers, "namespaces"):
            assert [call.args[3] for call in worker.call_args_list] == expected


# Refusals


@pytest.mark.parametrize(("arguments", "message"), REFUSED["sandbox"])
def test_bad_arguments(arguments, message):
    of_program = arguments.keys() & {"timeout", "memory_mb"}
    with pytest.raises(ValueError, match=message):
        check_program(DOUBLE, [], **arguments) if of_program else Sandbox(**arguments)


@pytest.mark.parametrize("allow_weak", [False, True])
def test_where_no_level_works_each_one_says_why(monkeypatch, allow_weak):
    monkeypatch.setattr(pool, "problem_of", lambda level, fresh=False: f"no {level} today")
    with pytest.raises(SandboxUnavailableError) as refused:
        Sandbox(allow_weak=allow_weak)
    text = str(refused.value)
    levels = [level for level in LEVELS if allow_weak or level not in WEAK_LEVELS]
    why = "; ".join(f"{level}: no {level} today" for level in levels)
    for part in (f"({why})", "bubblewrap (apt-get", "max_user_namespaces"):
        assert part in text
    assert ("--allow-weak-sandbox" in text) != allow_weak, "what was passed is no advice"
    assert text.count(". ") == 0


def test_weak_levels_must_be_asked_for(monkeypatch):
    monkeypatch.setattr(pool, "problem_of", lambda level: None if level in WEAK_LEVELS else "no")
    with pytest.raises(SandboxUnavailableError):
        best_level()
    assert best_level(allow_weak=True) == "landlock"


# Of processes


def printed_by(program: str, *flags: str) -> str:
    command = [sys.executable, *flags, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


#: Makes a process one of a user with one number, in an interpreter of his own.
BECOME_ORDINARY = """
import os, resource, sys
from gem_ds.evaluate.sandbox import Program, Sandbox, confine, jails, room
if os.geteuid() == 0:
    sys.executable = room.interpreter()
    jails.open_to_all(list(room.sources()))
    os.setgroups([])
    os.setresgid(*[54321] * 3)
    os.setresuid(*[54321] * 3)
"""


@pytest.mark.parametrize("level", LEVELS)
def test_the_users_own_threads_are_none_of_a_candidates_processes(level):
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
    jobs = [Program(forks, ("assert 90 < f() < 140",)), Program(storm, ("f()",), timeout=1.0)]
    print(*[v.status for v in sandbox.check_all([*jobs, jobs[0]])], flush=True)
os._exit(0)
"""
    assert printed_by(BECOME_ORDINARY + program).split() == ["passed", "timeout", "passed"]


def test_the_users_own_files_and_processes_stay_as_they_are():
    """At the weakest level an ordinary user's candidates are this user, and see his files."""
    if problem := problem_of("landlock"):
        pytest.skip(problem)
    script = """
import os, socket, tempfile
home = tempfile.mkdtemp(prefix="gem-home-", dir="/tmp")
key = home + "/key"
os.close(os.open(key, os.O_CREAT | os.O_WRONLY, 0o600))
host = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
host.bind(home + "/log")
host.setblocking(False)
def state():
    of_files = [[os.stat(p).st_mode, os.stat(p).st_mtime_ns, os.listxattr(p)] for p in (key, home)]
    return of_files, os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
before = state()
with Sandbox(1, "landlock", allow_weak=True) as sandbox:
    test = f"assert (got := f({home!r}, {os.getpid()})) == [], got"
    (verdict,) = sandbox.check_all([Program(CANDIDATE, (test,), timeout=30.0)])
try:
    print("reached", host.recv(9))
except BlockingIOError:
    pass
print(verdict.status, verdict.detail, "unchanged" if before == state() else state())
for name in ("key", "log"): os.remove(f"{home}/{name}")
os.rmdir(home)
"""
    found = printed_by(
        f"{BECOME_ORDINARY}\nCANDIDATE = {STAND_INS['attempt'] + STAND_INS['meddler']!r}\n{script}"
    )
    assert found.split() == ["passed", "unchanged"]


def test_system_calls_have_the_numbers_of_the_kernel():
    """On this machine's processor, by the headers of its kernel, where they are installed."""
    headers = sorted(Path("/usr/include").glob("*/asm/unistd_64.h"))
    if not headers:
        pytest.skip("the kernel's headers are not installed")
    known = dict(re.findall(r"#define __NR_(\w+) (\d+)", headers[0].read_text()))
    for table in (system_calls._ALLOWED, system_calls._ON_FILES, system_calls._CONDITIONAL):
        for name, number in system_calls.numbers(table).items():
            assert number == int(known.get(name, number)), name


def test_no_limit_is_raised_above_the_hard_one():
    program = """
resource.setrlimit(resource.RLIMIT_NPROC, (4000, 4000))
for others in (300, 30_000, 10):
    confine.limit(others)
    print(*resource.getrlimit(resource.RLIMIT_NPROC))
"""
    found = printed_by(BECOME_ORDINARY + program).split()
    assert found == ["428", "428", "428", "428", "138", "138"]


def test_descriptors_above_a_lowered_limit_are_closed_too():
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
    assert printed_by(program) == "closed\n"


def test_the_package_stays_lean():
    """Server and candidate import it; what it loads makes each fork and each start dearer."""
    heavy = {"torch", "numpy", "importlib.metadata", "dataclasses", "inspect"}
    modules = {"candidate": heavy | {"typing", "socket", "re", "ctypes"}, "server": heavy}
    for module, dear in modules.items():
        script = f"import sys, gem_ds.evaluate.sandbox.{module}; print(*sys.modules)"
        assert not dear & set(printed_by(script, "-S").split()), module
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        sandbox.nothing  # noqa: B018
