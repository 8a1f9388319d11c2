"""From samples of programs to a score: run each in the sandbox, count, estimate pass@k.

    samples -> programs -> verdicts of the sandbox -> pass@k per problem -> mean, interval

What this file does not do: sample (`eval.passk`), or run anything in this process.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from gem_ds.data.tasks.mbpp import Problem
from gem_ds.evaluate.mbpp import entry_point_of, program_of
from gem_ds.evaluate.pass_at_k import CONFIDENCE, Counts, mean_pass_at_k, without_samples
from gem_ds.evaluate.samples import Sample
from gem_ds.evaluate.sampling import VERDICTS_FILE
from gem_ds.evaluate.sandbox import Program, Verdict
from gem_ds.evaluate.sandbox.program import MIN_MEMORY_MB
from gem_ds.files.atomic import atomic_write

STATUSES = ("passed", "failed", "timeout", "crashed")


class Judge(Protocol):
    """What runs programs: `gem_ds.evaluate.sandbox.Sandbox`."""

    @property
    def isolation(self) -> str:
        """The level of isolation, for the reader."""

    def check_all(self, programs: Iterable[Program]) -> Iterable[Verdict]:
        """The verdicts, in order."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use.

    Attributes:
        timeout: Seconds for the program and all its tests.
        memory_mb: MiB.
    """

    timeout: float
    memory_mb: int

    def __post_init__(self) -> None:
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"--timeout must be a positive number of seconds, not {self.timeout}.")
        if self.memory_mb < MIN_MEMORY_MB:
            raise ValueError(f"--memory_mb must be at least {MIN_MEMORY_MB}, not {self.memory_mb}.")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A sample, the program in it, and what came of that."""

    sample: Sample
    program: str
    verdict: Verdict


def judge(
    samples: Sequence[Sample],
    problems: Mapping[str, Problem],
    sandbox: Judge,
    limits: Limits,
    *,
    template: str | None = None,
    show_bar: bool = True,
) -> list[Judged]:
    """Run the program of every sample; equal programs of one problem are run once.

    Args:
        samples: Of these problems.
        problems: By task id.
        sandbox: Where they run.
        limits: For each of them.
        template: That of the prompts, if they are not the protocol's.
        show_bar: Whether a progress bar counts the programs.

    Returns:
        One entry per sample, in their order.
    """
    programs = [program_of(s.completion, problems[s.task_id], template) for s in samples]
    keys = [(sample.task_id, program) for sample, program in zip(samples, programs, strict=True)]
    distinct = list(dict.fromkeys(keys))
    jobs = [_job(problems[task_id], program, limits) for task_id, program in distinct]
    with tqdm(total=len(jobs), desc="Judging", unit="program", disable=not show_bar) as bar:
        verdicts = {}
        for key, verdict in zip(distinct, sandbox.check_all(jobs), strict=True):
            verdicts[key] = verdict
            bar.update()
    return [
        Judged(sample=sample, program=program, verdict=verdicts[sample.task_id, program])
        for sample, program in zip(samples, programs, strict=True)
    ]


def results_of(
    judged: Sequence[Judged], task_ids: Sequence[str], ks: Sequence[int], *, isolation: str
) -> dict[str, Any]:
    """The scores and what they were counted on, as results.json has them.

    Args:
        judged: The samples.
        task_ids: All problems, with samples or without.
        ks: The k of pass@k.
        isolation: The sandbox's level.

    Raises:
        ValueError: A problem has samples, but fewer than k.
    """
    tried, right = (
        Counter(j.sample.task_id for j in judged),
        Counter(j.sample.task_id for j in judged if j.verdict.status == "passed"),
    )
    counts = {name: Counts(num_samples=tried[name], num_correct=right[name]) for name in task_ids}
    statuses: Counter[str] = Counter(j.verdict.status for j in judged)
    in_jail = [j.verdict.status for j in judged if j.verdict.in_jail]
    scores = {}
    for k in ks:
        estimate = mean_pass_at_k(counts, k)
        interval = [estimate.low, estimate.high]
        scores[f"pass@{k}"] = {"score": estimate.score, "confidence_interval": interval}
    return {
        "n": max(tried.values(), default=0),
        "k": list(ks),
        "scores": scores,
        "confidence": CONFIDENCE,
        "num_problems": len(task_ids),
        "without_samples": without_samples(counts),
        "verdicts": {status: statuses[status] for status in STATUSES},
        "tested_in_jail": {"samples": len(in_jail), "passed": in_jail.count("passed")},
        "isolation": isolation,
    }


def summary(results: Mapping[str, Any]) -> str:
    """The result lines, from `results_of`."""
    parts = []
    for name, score in results["scores"].items():
        value, low, high = (100 * x for x in (score["score"], *score["confidence_interval"]))
        parts.append(f"{name} = {value:.1f} % ({low:.1f} to {high:.1f})")
    verdicts = ", ".join(f"{count} {status}" for status, count in results["verdicts"].items())
    lines = [
        f"{', '.join(parts)} on {results['num_problems']} problems, n = {results['n']}",
        f"programs: {verdicts}; isolation: {results['isolation']}",
    ]
    if passed := results["tested_in_jail"]["passed"]:
        lines.append(f"of those that passed, {passed} had a say in their tests (tested_in_jail)")
    if missing := results["without_samples"]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        lines.append(f"without samples, counted as zero: {', '.join(missing[:5])}{more}")
    return "\n".join(lines)


def save_verdicts(output_dir: Path, judged: Sequence[Judged]) -> None:
    """Write verdicts.jsonl: per sample what became of it, why, and the program that was run."""
    rows = [
        {
            "task_id": j.sample.task_id,
            "sample": j.sample.sample,
            "status": j.verdict.status,
            "detail": j.verdict.detail,
            "in_jail": j.verdict.in_jail,
            "program": j.program,
        }
        for j in judged
    ]
    payload = "".join(json.dumps(row) + "\n" for row in rows).encode()
    atomic_write(output_dir / VERDICTS_FILE, lambda path: path.write_bytes(payload))


def _job(problem: Problem, program: str, limits: Limits) -> Program:
    return Program(
        program=program,
        tests=problem.tests,
        setup=problem.setup,
        entry_point=entry_point_of(problem),
        timeout=limits.timeout,
        memory_mb=limits.memory_mb,
    )
