"""Every reference solution of MBPP passes in the sandbox, and a forgery passes none of its tests.

A reference that fails there is a right program counted as wrong, a forgery that passes is a wrong
one counted as right: together they bound what the sandbox can do to a score.
"""

from collections.abc import Mapping

import pytest

from gem_ds.data.tasks.mbpp import SPLITS, Problem, load_problems
from gem_ds.evaluate.mbpp import entry_point_of, problems_of
from gem_ds.evaluate.samples import Sample
from gem_ds.evaluate.sandbox import Sandbox
from gem_ds.evaluate.verdicts import Judged, Limits, judge

#: Whose tests make or compare objects of the solution's own classes, so that its code has a say.
IN_JAIL = {
    "mbpp/367": "the setup builds trees of the solution's class Node",
    "mbpp/601": "the tests make objects of the solution's class Pair",
    "mbpp/927": "the setup builds trees of the solution's class Node",
}

#: What passes where tests run beside the program: its result claims to equal whatever it meets.
FORGERY = """
class Everything(float):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __bool__(self): return True
    def __getattr__(self, name): return self
    def __call__(self, *args, **kwargs): return self
    def __iter__(self): return iter([self])
    def __len__(self): return 1
    def __getitem__(self, index): return self
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    __sub__ = __add__ = __abs__ = lambda self, *args: self

def {name}(*args, **kwargs):
    return Everything()
"""


def all_problems(gem_data_dir, *, sanitized: bool) -> dict[str, Problem]:
    dataset = load_problems(gem_data_dir / "mbpp", sanitized=sanitized)
    return {name: p for split in SPLITS for name, p in problems_of(dataset, split).items()}


def judge_codes(
    sandbox: Sandbox, problems: Mapping[str, Problem], codes: Mapping[str, str]
) -> list[Judged]:
    """Judge a program for each problem, as if a model had written it."""
    samples = [
        Sample(
            task_id=name,
            sample=0,
            prompt="",
            completion=f"{code}\n[DONE]",
            finish_reason="stop",
            num_tokens=1,
            settings={},
        )
        for name, code in codes.items()
    ]
    limits = Limits(timeout=60.0, memory_mb=1024)  # one takes 3 s, and on a busy machine long
    return judge(samples, problems, sandbox, limits, show_bar=False)


@pytest.mark.parametrize(("sanitized", "number"), [(False, 974), (True, 427)])
def test_every_reference_solution_passes(gem_data_dir, sandbox, sanitized, number):
    problems = all_problems(gem_data_dir, sanitized=sanitized)
    assert len(problems) == number
    judged = judge_codes(sandbox, problems, {name: p.code for name, p in problems.items()})
    assert {
        j.sample.task_id: f"{j.verdict.status}: {j.verdict.detail}"
        for j in judged
        if j.verdict.status != "passed"
    } == {}
    in_jail = {j.sample.task_id for j in judged if j.verdict.in_jail}
    assert in_jail == (set() if sanitized else IN_JAIL.keys())


def passes_beside_its_tests(program: str, problem: Problem) -> bool:
    """The verdict of those who run program and tests in one namespace."""
    try:
        exec("\n".join([program, problem.setup, *problem.tests]), {})
    except Exception:
        return False
    return True


def test_an_object_that_equals_everything_passes_no_test(gem_data_dir, sandbox):
    problems = all_problems(gem_data_dir, sanitized=False)
    codes = {
        name: FORGERY.replace("{name}", str(entry_point_of(p))) for name, p in problems.items()
    }
    beside = [passes_beside_its_tests(codes[name], p) for name, p in problems.items()]
    assert sum(beside) == 969, "of 974: this forgery is worth trying"
    judged = judge_codes(sandbox, problems, codes)
    assert {j.sample.task_id for j in judged if j.verdict.status == "passed"} == set()
