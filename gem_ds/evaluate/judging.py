"""The half of pass@k that needs no model: the flags, the sandbox, and the files of a result.

`eval.passk` comes here with the samples it has drawn, `eval.score` with those of a file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gem_ds.data.tasks.mbpp import Dataset, Problem, load_problems
from gem_ds.evaluate.arguments import option
from gem_ds.evaluate.mbpp import problems_of
from gem_ds.evaluate.provenance import versions
from gem_ds.evaluate.samples import Sample
from gem_ds.evaluate.sampling import RESULTS_FILE
from gem_ds.evaluate.sandbox import Sandbox
from gem_ds.evaluate.sandbox.pool import num_processors
from gem_ds.evaluate.verdicts import Limits, judge, results_of, save_verdicts, summary
from gem_ds.files.atomic import save_json


@dataclass(frozen=True, kw_only=True)
class JudgingArguments:
    """The flags that say which problems are asked and how programs are run."""

    k: list[int] | None = field(
        default=None,
        metadata={
            "help": "Each k of pass@k (default: 1, and 10 if a problem has so many samples)."
        },
    )
    sanitized: bool = option(False, "The sanitized set (427 problems), not the full one (974).")
    split: Literal["test", "validation", "train"] = option("test", "Which problems.")
    prompt_template: str | None = option(
        None,
        "Another prompt than MBPP's, with {text}, {tests} or {header} in it; from {header} on, "
        "for example `def f(x):`, the prompt is the beginning of the program.",
    )
    timeout: float = option(
        10.0, "Seconds that a program and its tests may take; the slowest reference takes 3."
    )
    memory_mb: int = option(1024, "MiB of memory that a program may take.")
    num_workers: int = option(
        2, "Programs that run at the same time; at most one on each processor."
    )
    allow_weak_sandbox: bool = option(
        False, "Run programs even where the host has no namespaces to lock them into."
    )

    def __post_init__(self) -> None:
        for k in self.k or ():
            if k < 1:
                raise ValueError(f"--k must be at least 1, not {k}.")
        if self.num_workers < 1:
            raise ValueError(f"--num_workers must be at least 1, not {self.num_workers}.")
        Limits(timeout=self.timeout, memory_mb=self.memory_mb)  # refuses what nothing can keep to

    @property
    def limits(self) -> Limits:
        """What a program may use."""
        return Limits(timeout=self.timeout, memory_mb=self.memory_mb)

    def ks(self, num_samples: int, where: str) -> list[int]:
        """Each k of pass@k, where a problem has so many samples.

        Raises:
            ValueError: That is too few for one of them; the sentence has `where` in it.
        """
        if self.k is None:
            return [k for k in (1, 10) if k <= num_samples]
        if num_samples < max(self.k):
            raise ValueError(
                f"pass@{max(self.k)} needs at least {max(self.k)} samples of a problem and {where} "
                f"{num_samples}: draw more samples or lower --k."
            )
        return self.k


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked: a data set, and by task id those of its problems that count."""

    dataset: Dataset
    problems: dict[str, Problem]


def load(arguments: JudgingArguments, data_dir: str | None, limit: int | None) -> Asked:
    """The problems of the split, or the first `limit` of them; raises ValueError."""
    dataset = load_problems(data_dir, sanitized=arguments.sanitized)
    return Asked(dataset=dataset, problems=problems_of(dataset, arguments.split, limit))


def open_sandbox(arguments: JudgingArguments) -> Sandbox:
    """The sandbox, to be entered; raises `gem_ds.evaluate.sandbox.SandboxUnavailableError`."""
    workers, allow_weak = arguments.num_workers, arguments.allow_weak_sandbox
    if workers > num_processors():
        print(
            f"--num_workers {workers} is lowered to {num_processors()}, the number of processors: "
            "programs that share one would run out of time.",
            file=sys.stderr,
        )
    return Sandbox(num_workers=workers, allow_weak=allow_weak)


def report(
    samples: Sequence[Sample],
    arguments: JudgingArguments,
    asked: Asked,
    sandbox: Sandbox,
    output_dir: Path,
    *,
    ks: Sequence[int],
    num_fewshot: int,
    show_bar: bool = True,
) -> dict[str, Any]:
    """Judge the samples, write verdicts.jsonl and results.json, print the result.

    Args:
        samples: Of these problems, all drawn with the same settings.
        arguments: The flags.
        asked: The problems; those without samples count as zero.
        sandbox: An entered one.
        output_dir: Where the files go.
        ks: Each k of pass@k.
        num_fewshot: Worked problems in the prompts.
        show_bar: Whether a progress bar counts the programs.

    Returns:
        What results.json holds.

    Raises:
        ValueError: A problem has samples, but fewer than k.
        OSError: A file cannot be written.
    """
    template, limits = arguments.prompt_template, arguments.limits
    judged = judge(samples, asked.problems, sandbox, limits, template=template, show_bar=show_bar)
    scores = results_of(judged, list(asked.problems), ks, isolation=sandbox.isolation)
    results = {
        "task": "mbpp",
        **scores,
        "protocol": {
            "split": arguments.split,
            "sanitized": arguments.sanitized,
            "num_fewshot": num_fewshot,
            "prompt_template": template,
            **asdict(limits),
        },
        "sampling": samples[0].settings,
        "data_sha256": {asked.dataset.source: asked.dataset.sha256},
        "versions": versions(),
    }
    (output_dir / RESULTS_FILE).unlink(missing_ok=True)  # never beside other verdicts
    save_verdicts(output_dir, judged)
    save_json(output_dir / RESULTS_FILE, results)
    print(summary(results))
    return results
