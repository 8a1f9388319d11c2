"""From samples to a score, with a judge that follows a table: no program is run here."""

import json
from collections.abc import Iterable, Iterator

import pytest

from gem_ds.data.tasks.mbpp import Dataset, Problem
from gem_ds.evaluate.mbpp import Mbpp, MbppArguments
from gem_ds.evaluate.pass_at_k import results_of, summary
from gem_ds.evaluate.passk import verdicts_of
from gem_ds.evaluate.samples import Sample
from gem_ds.evaluate.sandbox import Program, Verdict
from tests.tiny_evaluation import make_sample

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
BENCHMARK = Mbpp(
    dataset=Dataset(problems={}, source="", sha256=""), problems=PROBLEMS, flags=MbppArguments()
)


class Table:
    """A judge that finds its verdict in the program's text, and keeps what it was given."""

    isolation = "none: a table"

    def __init__(self) -> None:
        self.jobs: list[Program] = []

    def check_all(self, programs: Iterable[Program]) -> Iterator[Verdict]:
        for job in programs:
            self.jobs.append(job)
            statuses = ("passed", "failed", "timeout", "crashed")
            status = next(status for status in statuses if status in job.program)
            detail, in_jail = f"the table says {status}", "class" in job.program
            yield Verdict(status, self.isolation, detail, in_jail)


def judged(*samples: Sample):
    table = Table()
    return table.jobs, verdicts_of(samples, BENCHMARK, table, LIMITS)


def test_each_program_meets_the_tests_of_its_problem_and_is_told_with_its_verdict():
    jobs, entries = judged(
        make_sample("mbpp/12", 0, "Sure:\n```\ndef f(x):\n    return 'passed'\n```"),
        make_sample("mbpp/11", 0, "def f(x):\n    class A: 'failed'\n[DONE]"),
    )
    programs = ["def f(x):\n    return 'passed'\n", "def f(x):\n    class A: 'failed'"]
    assert [job.program for job in jobs] == programs
    for job, name in zip(jobs, ("mbpp/12", "mbpp/11"), strict=True):
        assert (job.tests, job.setup) == (PROBLEMS[name].tests, PROBLEMS[name].setup)
        assert (job.entry_point, job.timeout, job.memory_mb) == ("f", 1.5, 64)
    assert [(entry["task_id"], entry["status"]) for entry in entries] == [
        ("mbpp/12", "passed"),
        ("mbpp/11", "failed"),
    ]
    assert entries[1] == {
        "task_id": "mbpp/11",
        "sample": 0,
        "status": "failed",
        "detail": "the table says failed",
        "in_jail": True,
        "program": programs[1],
    }


def test_equal_programs_of_one_problem_are_run_once():
    texts = [("mbpp/11", 0, "passed"), ("mbpp/11", 1, "timeout"), ("mbpp/11", 2, "passed")]
    texts.append(("mbpp/12", 0, "passed"))
    jobs, entries = judged(*(make_sample(*text) for text in texts))
    assert [(job.setup, job.program) for job in jobs] == [
        ("import m11", "passed"),
        ("import m11", "timeout"),
        ("import m12", "passed"),
    ]
    assert [(e["task_id"], e["sample"], e["status"]) for e in entries] == texts


def test_results_count_every_problem_and_every_status():
    _, entries = judged(
        *(make_sample("mbpp/11", i, text) for i, text in enumerate(["passed", "failed"])),
        *(make_sample("mbpp/13", i, text) for i, text in enumerate(["timeout", "crashed"])),
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


def test_verdicts_that_could_be_forged_are_counted_and_told():
    texts = ["class A: 'passed'", "class A: 'failed'", "passed"]
    _, entries = judged(*(make_sample("mbpp/11", i, text) for i, text in enumerate(texts)))
    results = results_of(entries, IDS[:1], [1], isolation="box")
    assert results["tested_in_jail"] == {"samples": 2, "passed": 1}
    assert summary(results).split("\n")[2].startswith("of those that passed, 1 had a say")


def test_the_summary_says_what_was_counted_and_cuts_a_long_list_of_problems():
    _, entries = judged(make_sample("mbpp/11", 0, "passed"), make_sample("mbpp/13", 0, "passed"))
    first, second, third = summary(results_of(entries, IDS, [1], isolation="box")).split("\n")
    assert first.startswith("pass@1 = 66.7 % (")
    assert first.endswith(" on 3 problems, n = 1")
    assert second == "programs: 2 passed, 0 failed, 0 timeout, 0 crashed; isolation: box"
    assert third == "without samples, counted as zero: mbpp/12"
    ids = [f"mbpp/{i}" for i in range(11, 31)]
    results = results_of(entries[:1], ids, [1], isolation="box")
    assert results["without_samples"] == ids[1:]
    assert summary(results).split("\n")[-1] == (
        "without samples, counted as zero: mbpp/12, mbpp/13, mbpp/14, mbpp/15, mbpp/16 and 14 more"
    )
