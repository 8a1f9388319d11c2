"""Awkward honest programs: the sandbox's verdict is that of plain Python, run beside the tests."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

import pytest

from gem_ds.evaluate.sandbox import Program, Sandbox, check_program, pool
from gem_ds.evaluate.sandbox.pool import problem_of
from gem_ds.evaluate.sandbox.room import interpreter
from tests.evaluate.test_sandbox_programs import WAYS
from tests.tiny_evaluation import refusal

TABLE, PACKAGES = (
    Path(__file__).with_name(f"plain_{name}.toml") for name in ("python", "packages")
)
#: Prints which programs of a table pass their tests in one namespace, each in a process of its own.
ORACLE = """
import json, os, sys, tomllib, types

def passes(case):
    module = sys.modules["candidate"] = types.ModuleType("candidate")
    for source in (case.get("setup", ""), case["program"], *case["tests"]):
        exec(compile(source, "candidate.py", "exec", dont_inherit=True), module.__dict__)

found = {}
for name, case in tomllib.load(open(sys.argv[1], "rb")).items():
    if "status" in case: continue
    if (pid := os.fork()) == 0:
        status = 1
        try:
            passes(case)
            status = 0
        finally:
            os._exit(status)
    found[name] = os.waitpid(pid, 0)[1] == 0
print(json.dumps(found), file=sys.stderr)
"""


def passing(folder: Path, table: Path, *python: str) -> dict[str, bool]:
    """Which programs of a table pass in an interpreter."""
    command = [*python, "-c", ORACLE, str(table)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True)
    found: dict[str, bool] = json.loads(done.stderr.splitlines()[-1])
    return found


def test_the_verdicts_are_those_of_plain_python(sandbox, tmp_path):
    expected = passing(tmp_path, TABLE, interpreter(), "-S")
    cases = tomllib.loads(TABLE.read_text())
    assert len(cases) > 130
    assert 0 < sum(not passes for passes in expected.values()) < 20, "some are wrong on purpose"
    programs = [Program(c["program"], tuple(c["tests"]), timeout=30.0) for c in cases.values()]
    for (name, case), verdict in zip(cases.items(), sandbox.check_all(programs), strict=True):
        status = "passed" if expected[name] else "failed"
        told = (verdict.status, case.get("in_jail", verdict.in_jail))
        assert told == (status, verdict.in_jail), (name, verdict)


@pytest.fixture(scope="module")
def with_packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Which programs of the table of packages pass in plain Python."""
    return passing(tmp_path_factory.mktemp("plain"), PACKAGES, sys.executable, "-I")


@pytest.mark.parametrize(("level", "fresh"), WAYS)
def test_packages_that_are_shown_do_what_they_do_in_plain_python(level, fresh, with_packages):
    """At every level, within 512 MiB; a test that plain data cannot answer for runs beside."""
    if problem := problem_of(level, fresh):
        pytest.skip(f"{level}: {problem}")
    cases = tomllib.loads(PACKAGES.read_text())
    programs = [
        Program(c["program"], tuple(c["tests"]), c.get("setup", ""), timeout=60.0, memory_mb=512)
        for c in cases.values()
    ]
    packages = ["numpy", "jinja2", "typing_extensions"]
    with Sandbox(2, level, allow_weak=True, fresh=fresh, packages=packages) as sandbox:
        verdicts = list(sandbox.check_all(programs))
    for (name, case), verdict in zip(cases.items(), verdicts, strict=True):
        expected = case.get("status") or ("passed" if with_packages[name] else "failed")
        told = (verdict.status, case.get("in_jail", verdict.in_jail))
        assert told == (expected, verdict.in_jail), (name, verdict)


@pytest.mark.parametrize(("level", "fresh"), WAYS)
def test_a_package_may_lie_where_programs_have_their_scratch(level, fresh, tmp_path):
    """As an environment under /tmp does, which a cell covers; one without a way in is refused."""
    if problem := problem_of(level, fresh):
        pytest.skip(f"{level}: {problem}")
    assert tmp_path.is_relative_to("/tmp"), "the premise"
    package = tmp_path / "lying_here"
    package.mkdir()
    (package / "__init__.py").write_text("from lying_here.part import X\n")
    (package / "part.py").write_text("X = 7\n")
    program = "import lying_here\ndef f(): return lying_here.X"
    options = {"allow_weak": True, "fresh": fresh, "packages": ["lying_here"]}
    with (
        mock.patch.object(pool, "paths_of", return_value=(str(package),)),
        Sandbox(1, level, **options) as sandbox,
    ):
        (verdict,) = sandbox.check_all([Program(program, ("assert f() == 7",), timeout=60.0)])
    assert verdict.status == "passed", verdict
    (package / "part.py").unlink()
    with mock.patch.object(pool, "paths_of", return_value=(str(package),)):
        told = refusal(Sandbox, 1, level, **options)
    assert told.startswith("--sandbox_packages lying_here cannot be imported in the sandbox (")


def test_a_package_is_absent_where_it_is_not_named_and_must_be_installed():
    program, tests = "import numpy\ndef f(): return numpy.__name__", ["assert f() == 'numpy'"]
    assert check_program(program, tests, packages=["numpy"]).status == "passed"
    verdict = check_program(program, tests)
    assert (verdict.status, "No module named 'numpy'" in verdict.detail) == ("failed", True)
    for name in ("nosuchpackage", "numpy.linalg", "gem_ds", ""):
        told = refusal(check_program, program, tests, packages=[name])
        assert told.startswith(f"--sandbox_packages {name}: no package is installed here")
