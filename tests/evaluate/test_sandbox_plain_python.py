"""Awkward honest programs: the sandbox's verdict is that of plain Python, run beside the tests."""

import json
import subprocess
import tomllib
from pathlib import Path

from gem_ds.evaluate.sandbox import Program, Sandbox
from gem_ds.evaluate.sandbox.room import interpreter

TABLE = Path(__file__).with_name("plain_python.toml")
#: Prints which programs of a table pass their tests in one namespace, each in a process of its own.
ORACLE = """
import json, os, sys, tomllib, types

def passes(case):
    module = sys.modules["candidate"] = types.ModuleType("candidate")
    for source in (case["program"], *case["tests"]):
        exec(compile(source, "candidate.py", "exec", dont_inherit=True), module.__dict__)

found = {}
for name, case in tomllib.load(open(sys.argv[1], "rb")).items():
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


def test_the_verdicts_are_those_of_plain_python(sandbox: Sandbox, tmp_path: Path) -> None:
    command = [interpreter(), "-S", "-c", ORACLE, str(TABLE)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    expected = json.loads(done.stderr.splitlines()[-1])
    cases = tomllib.loads(TABLE.read_text())
    assert len(cases) > 130
    assert 0 < sum(not passes for passes in expected.values()) < 20, "some are wrong on purpose"
    programs = [Program(c["program"], tuple(c["tests"]), timeout=30.0) for c in cases.values()]
    for (name, case), verdict in zip(cases.items(), sandbox.check_all(programs), strict=True):
        status = "passed" if expected[name] else "failed"
        told = (verdict.status, case.get("in_jail", verdict.in_jail))
        assert told == (status, verdict.in_jail), (name, verdict)
