"""From samples to a score, with a judge that follows a table: no program is run here."""

import json
from collections.abc import Iterable, Iterator

import pytest

from gem_ds.data.tasks.mbpp import Dataset, Problem
from gem_ds.evaluate.mbpp import Mbpp, MbppArguments
from gem_ds.evaluate.pass_at_k import results_of, summary
from gem_ds.evaluate.passk import JudgingArguments, verdicts_of
from gem_ds.evaluate.samples import Sample
from gem_ds.evaluate.sandbox import Program, Verdict

LIMITS = {"timeout": 1.5, "memory_mb": 64}
IDS = ["mbpp/11", "mbpp/12", "mbpp/13"]
PROBLEMS = {
    name: Problem(
        task_id=i,
        text="",
        code="def f(x):\n    return x",
        tests=(f"assert f({i}) == {i}", "assert f(1) == 1"),
        setup=f"import m{i}",
    )
    for i, name in enumerate(IDS, start=11)
}


def sample(task_id: str, number: int, completion: str) -> Sample:
    return Sample(
        task_id=task_id,
        sample=number,
        prompt="p",
        completion=completion,
        finish_reason="stop",
        num_tokens=3,
        settings={"seed": 0},
    )


class Table:
    """A judge that finds its verdict in the program's text, and keeps what it was given."""

    isolation = "none: a table"

    def __init__(self) -> None:
        self.jobs: list[Program] = []

    def check_all(self, programs: Iterable[Program]) -> Iterator[Verdict]:
        for program in programs:
            self.jobs.append(program)
            status = next(
                s for s in ("passed", "failed", "timeout", "crashed") if s in program.program
            )
            yield Verdict(
                status=status,
                isolation=self.isolation,
                detail=f"the table says {status}",
                in_jail="class" in program.program,
            )


def judged(*samples: Sample):
    table, dataset = Table(), Dataset(problems={}, source="", sha256="")
    benchmark = Mbpp(dataset=dataset, problems=PROBLEMS, flags=MbppArguments())
    return table, verdicts_of(samples, benchmark, table, LIMITS, show_bar=False)


def test_each_program_meets_the_tests_of_its_problem():
    table, entries = judged(
        sample("mbpp/12", 0, "Sure:\n```\ndef f(x):\n    return 'passed'\n```"),
        sample("mbpp/11", 0, "def f(x):\n    return 'failed'\n[DONE]"),
    )
    assert [job.program for job in table.jobs] == [
        "def f(x):\n    return 'passed'\n",
        "def f(x):\n    return 'failed'",
    ]
    for job, name in zip(table.jobs, ("mbpp/12", "mbpp/11"), strict=True):
        assert tuple(job.tests) == PROBLEMS[name].tests
        assert job.setup == PROBLEMS[name].setup
        assert (job.entry_point, job.timeout, job.memory_mb) == ("f", 1.5, 64)
    assert [e["status"] for e in entries] == ["passed", "failed"]
    assert [e["program"] for e in entries] == [job.program for job in table.jobs]


def test_equal_programs_of_one_problem_are_run_once():
    table, entries = judged(
        sample("mbpp/11", 0, "passed"),
        sample("mbpp/11", 1, "timeout"),
        sample("mbpp/11", 2, "passed"),
        sample("mbpp/12", 0, "passed"),
    )
    assert [(job.setup, job.program) for job in table.jobs] == [
        ("import m11", "passed"),
        ("import m11", "timeout"),
        ("import m12", "passed"),
    ]
    assert [e["status"] for e in entries] == ["passed", "timeout", "passed", "passed"]
    assert [(e["task_id"], e["sample"]) for e in entries] == [
        ("mbpp/11", 0),
        ("mbpp/11", 1),
        ("mbpp/11", 2),
        ("mbpp/12", 0),
    ]


def test_results_count_every_problem_and_every_status():
    _, entries = judged(
        *(sample("mbpp/11", i, text) for i, text in enumerate(["passed", "failed"])),
        *(sample("mbpp/13", i, text) for i, text in enumerate(["timeout", "crashed"])),
    )
    results = results_of(entries, IDS, [1, 2], isolation="box")
    assert results["scores"]["pass@1"]["score"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert results["scores"]["pass@2"]["score"] == pytest.approx((1 + 0 + 0) / 3)
    low, high = results["scores"]["pass@2"]["confidence_interval"]
    assert 0 <= low <= 1 / 3 <= high <= 1
    assert results["num_problems"] == 3
    assert results["without_samples"] == ["mbpp/12"]
    assert results["verdicts"] == {"passed": 1, "failed": 1, "timeout": 1, "crashed": 1}
    assert (results["n"], results["k"], results["isolation"]) == (2, [1, 2], "box")
    assert json.loads(json.dumps(results)) == results
    with pytest.raises(ValueError, match=r"mbpp/11 has 2 samples and pass@3 needs"):
        results_of(entries, IDS, [3], isolation="box")


def test_verdicts_that_could_be_forged_are_counted():
    _, entries = judged(
        sample("mbpp/11", 0, "class A: 'passed'"),
        sample("mbpp/11", 1, "class A: 'failed'"),
        sample("mbpp/11", 2, "passed"),
    )
    results = results_of(entries, IDS, [1], isolation="box")
    assert results["tested_in_jail"] == {"samples": 2, "passed": 1}


def test_the_summary_says_what_was_counted():
    _, entries = judged(sample("mbpp/11", 0, "passed"), sample("mbpp/13", 0, "passed"))
    results = results_of(entries, IDS, [1], isolation="box")
    first, second, third = summary(results).split("\n")
    assert first.startswith("pass@1 = 66.7 % (")
    assert first.endswith(" on 3 problems, n = 1")
    assert second == "programs: 2 passed, 0 failed, 0 timeout, 0 crashed; isolation: box"
    assert third == "without samples, counted as zero: mbpp/12"


def test_a_long_list_of_problems_without_samples_is_cut_in_the_summary_only():
    ids = [f"mbpp/{i}" for i in range(11, 31)]
    results = results_of(judged(sample("mbpp/11", 0, "passed"))[1], ids, [1], isolation="box")
    assert results["without_samples"] == ids[1:]
    last = summary(results).split("\n")[-1]
    assert last == (
        "without samples, counted as zero: mbpp/12, mbpp/13, mbpp/14, mbpp/15, mbpp/16 and 14 more"
    )


def test_a_verdict_says_what_was_run_and_why_it_failed():
    _, entries = judged(sample("mbpp/11", 0, "passed"), sample("mbpp/11", 1, "class: failed"))
    assert entries[1] == {
        "task_id": "mbpp/11",
        "sample": 1,
        "status": "failed",
        "detail": "the table says failed",
        "in_jail": True,
        "program": "class: failed",
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"timeout": 0.0}, "timeout must be a positive .*, not 0.0"),
        ({"timeout": float("nan")}, "timeout must be a positive .*, not nan"),
        ({"timeout": float("inf")}, "timeout must be a positive .*, not inf"),
        ({"memory_mb": 63}, "memory_mb must be at least 64 .*, not 63"),
    ],
)
def test_limits_that_nothing_could_keep_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        JudgingArguments(**values)
