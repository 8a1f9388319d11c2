"""Every reference solution of MBPP passes in the sandbox, and a forgery passes none of its tests.

A reference that fails there is a right program counted as wrong, a forgery that passes is a wrong
one counted as right: together they bound what the sandbox can do to a score.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from gem_ds.data.tasks.mbpp import SPLITS, Problem, load_problems
from gem_ds.evaluate.mbpp import Mbpp, MbppArguments, entry_point_of
from gem_ds.evaluate.passk import JudgingArguments, verdicts_of
from gem_ds.evaluate.sandbox import Sandbox
from tests.tiny_evaluation import make_sample

pytestmark = pytest.mark.slow  # starts engines or programs

#: In whose tests the solution's code has a say, by whether the set is the sanitized one.
IN_JAIL = {
    False: {
        "mbpp/367": "the setup builds trees of the solution's class Node",
        "mbpp/601": "the tests make objects of the solution's class Pair",
        "mbpp/927": "the setup builds trees of the solution's class Node",
    },
    True: dict.fromkeys(
        ("mbpp/737", "mbpp/787", "mbpp/794"), "the truth is asked of a match that is returned"
    ),
}

#: Passes where tests run beside the program.
FORGERY = tomllib.loads(Path(__file__).with_name("stand_ins.toml").read_text())["forgery"]


def all_problems(gem_data_dir, *, sanitized: bool) -> Mbpp:
    dataset = load_problems(gem_data_dir / "mbpp", sanitized=sanitized)
    problems = {f"mbpp/{p.task_id}": p for split in SPLITS for p in dataset.split(split)}
    return Mbpp(dataset=dataset, problems=problems, flags=MbppArguments(sanitized=sanitized))


def verdicts_on(sandbox: Sandbox, benchmark: Mbpp, codes: Mapping[str, str]) -> list[dict]:
    """Judge a program for each problem, as if a model had written it."""
    samples = [make_sample(name, 0, f"{code}\n[DONE]") for name, code in codes.items()]
    judging = JudgingArguments(timeout=60.0)  # one takes 3 s, and on a busy machine long
    return verdicts_of(samples, benchmark, sandbox, judging)


@pytest.mark.parametrize(("sanitized", "number"), [(False, 974), (True, 427)])
def test_every_reference_solution_passes(gem_data_dir, sandbox, sanitized, number):
    benchmark = all_problems(gem_data_dir, sanitized=sanitized)
    assert len(benchmark.problems) == number
    codes = {name: p.code for name, p in benchmark.problems.items()}
    verdicts = verdicts_on(sandbox, benchmark, codes)
    assert [v for v in verdicts if v["status"] != "passed"] == []
    in_jail = {verdict["task_id"] for verdict in verdicts if verdict["in_jail"]}
    assert in_jail == IN_JAIL[sanitized].keys()


def passes_beside_its_tests(program: str, problem: Problem) -> bool:
    """The verdict of those who run program and tests in one namespace."""
    try:
        exec("\n".join([program, problem.setup, *problem.tests]), {})
    except Exception:
        return False
    return True


def test_an_object_that_equals_everything_passes_no_test(gem_data_dir, sandbox):
    """On every fourth problem."""
    benchmark = all_problems(gem_data_dir, sanitized=False)
    problems = dict(list(benchmark.problems.items())[::4])
    codes = {
        name: FORGERY.replace("{name}", str(entry_point_of(p))) for name, p in problems.items()
    }
    beside = [passes_beside_its_tests(codes[name], p) for name, p in problems.items()]
    assert sum(beside) == 243, "of 244: this forgery is worth trying"
    verdicts = verdicts_on(sandbox, benchmark, codes)
    assert {v["task_id"] for v in verdicts if v["status"] == "passed"} == set()
