"""pass@k on benchmarks of programs: sample programs, run them in the sandbox, estimate.

    python -m eval.passk --model_name_or_path M [--delta F] [--data_dir D] --output_dir O
        [--task mbpp|humaneval] [--num_samples 10 --k 1 10 --temperature 0.8 --top_p 0.95]
        [--sanitized] [--num_fewshot 0] [--apply_chat_template]

    samples -> programs -> verdicts of the sandbox -> pass@k per problem -> mean, interval

A sample passes when its program, the problem's setup code and all of the problem's tests run
without an error. Greedy pass@1 is `--num_samples 1 --k 1 --temperature 0`. A further benchmark is
a class as `humaneval.HumanEval`, in a file of its own, and an entry in `Benchmark` and in `TASKS`.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any

from gem_ds.evaluate import humaneval, mbpp
from gem_ds.evaluate.evaluator import Report, evaluate, refuse_other_prompts
from gem_ds.evaluate.generation import GenerationSettings
from gem_ds.evaluate.model import SamplingArguments
from gem_ds.evaluate.pass_at_k import results_of, summary
from gem_ds.evaluate.prompt_form import PromptForm, recorded_form
from gem_ds.evaluate.samples import Sample
from gem_ds.evaluate.sampling import sample_all
from gem_ds.evaluate.sandbox import Program, Sandbox
from gem_ds.evaluate.sandbox.packages import find_packages
from gem_ds.evaluate.sandbox.pool import best_level, num_processors
from gem_ds.flags import option, refuse_below_one
from gem_ds.progress import Progress

#: How the problems of a benchmark are asked, and what a completion stands for.
Benchmark = mbpp.Mbpp | humaneval.HumanEval

#: By name: the flags of its own that a benchmark has, if any, and how it is loaded with these.
TASKS: dict[str, tuple[type | None, Callable[..., Benchmark]]] = {
    "mbpp": (mbpp.MbppArguments, mbpp.load),
    "humaneval": (None, humaneval.load),
}
OWN_FLAGS = [flags for flags, _ in TASKS.values() if flags is not None]


@dataclass(frozen=True, kw_only=True)
class PassKArguments:
    """The flags of sampling that are this evaluator's own."""

    task: str = option("mbpp", "Which problems are asked.", choices=[*TASKS])
    num_samples: int = option(  # launchers take --n for a flag of their own
        10, "Samples of each problem.", aliases=["--n"]
    )
    temperature: float = option(0.8, "Divides the logits; 0 is greedy.")
    top_p: float = option(0.95, "Share of the probability that tokens are drawn from.")
    max_new_tokens: int = option(512, "The longest completion, in tokens.")
    seed: int = option(0, "Of the noise in sampling.")
    num_fewshot: int | None = option(
        None, "mbpp: worked problems in the prompt, 0 or 3 (default: 3, and 0 with a template)."
    )

    def __post_init__(self) -> None:
        refuse_below_one(num_samples=self.num_samples)
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"--temperature 0 is greedy, and {self.num_samples} samples would be the same one: "
                "pass --num_samples 1 --k 1, or a temperature."
            )


@dataclass(frozen=True, kw_only=True)
class JudgingArguments:
    """The flags that say how programs are run and counted."""

    k: list[int] | None = option(
        None, "Each k of pass@k (default: 1, and 10 if a problem has so many samples)."
    )
    timeout: float = option(
        10.0, "Seconds that a program and its tests may take; the slowest reference takes 3."
    )
    memory_mb: int = option(1024, "MiB of memory that a program may take.")
    num_workers: int = option(
        2, "Programs that run at the same time; at most one on each processor."
    )
    sandbox_packages: list[str] | None = option(
        None, "Installed packages that programs may import beside the standard library."
    )
    allow_weak_sandbox: bool = option(
        False, "Run programs even where the host has no namespaces to lock them into."
    )

    def __post_init__(self) -> None:
        refuse_below_one(k=min(self.k or [1]), num_workers=self.num_workers)
        Program("", (), **self.limits)  # refuses what nothing can keep to
        find_packages(self.sandbox_packages or ())  # refuses what is not installed

    @property
    def limits(self) -> dict[str, Any]:
        """What a program may use."""
        return {"timeout": self.timeout, "memory_mb": self.memory_mb}

    @property
    def packages(self) -> dict[str, Any]:
        """What verdicts say of the packages that programs could import; nothing without any."""
        versions = find_packages(self.sandbox_packages or ())
        return {"sandbox_packages": versions} if versions else {}

    def ks(self, num_samples: int, where: str) -> list[int]:
        """Each k of pass@k for so many samples of a problem; a refusal says `where` these are."""
        if self.k is None:
            return [k for k in (1, 10) if k <= num_samples]
        if num_samples < max(self.k):
            raise ValueError(
                f"pass@{max(self.k)} needs at least {max(self.k)} samples of a problem and {where} "
                f"{num_samples}: draw more samples or lower --k."
            )
        return self.k

    def open_sandbox(self) -> Sandbox:
        """The sandbox, to be entered."""
        if self.num_workers > (most := num_processors()):
            print(
                f"--num_workers {self.num_workers} is lowered to {most}, the number of processors: "
                "programs that share one would run out of time.",
                file=sys.stderr,
            )
        return Sandbox(
            num_workers=self.num_workers,
            allow_weak=self.allow_weak_sandbox,
            packages=self.sandbox_packages or (),
        )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate a model, as `gem_ds.evaluate.evaluator.evaluate`."""
    flags = [PassKArguments, JudgingArguments, PromptForm, *OWN_FLAGS]
    about = "pass@k of a causal language model on a benchmark of programs."
    return evaluate("eval passk", about, flags, _judge, argv)


def _judge(
    arguments: SamplingArguments,
    own: PassKArguments,
    judging: JudgingArguments,
    form: PromptForm,
    *flags: Any,
) -> Report | None:
    judging.ks(own.num_samples, "--num_samples is")
    benchmark = load(own.task, arguments.data_dir, arguments.limit, flags)
    num_fewshot = benchmark.num_fewshot(own.num_fewshot)
    settings = GenerationSettings(
        max_new_tokens=own.max_new_tokens,
        stop_strings=benchmark.stop_strings(form),
        temperature=own.temperature,
        top_p=own.top_p,
        seed=own.seed,
    )
    prompts = benchmark.prompts(num_fewshot, form)
    if int(os.environ.get("RANK", 0)) == 0:
        best_level(judging.allow_weak_sandbox)  # refuses the host before a model is loaded
    recorded = form.recorded(num_fewshot)
    samples = sample_all(arguments, prompts, settings, num_samples=own.num_samples, form=recorded)
    if samples is None:
        return None
    return report(own.task, benchmark, samples, judging, show_bar=not arguments.disable_tqdm)


def load(task: str, data_dir: str | None, limit: int | None, flags: Sequence[Any]) -> Benchmark:
    """A benchmark of `TASKS`, with its own ones of these flags; refuses flags of other ones."""
    kind, load_task = TASKS[task]
    own = [given for given in flags if type(given) is kind]
    for given in flags:
        if given not in own:
            refuse_changed(given, task)
    return load_task(data_dir, limit, *own)


def refuse_changed(flags: Any, task: str) -> None:
    """Raise ValueError if flags that say nothing about a task were given."""
    for flag in fields(flags):
        if getattr(flags, flag.name) != flag.default:
            raise ValueError(f"--{flag.name} has no meaning for --task {task}: leave it out.")


def report(
    task: str,
    benchmark: Benchmark,
    samples: Sequence[Sample],
    judging: JudgingArguments,
    *,
    show_bar: bool,
) -> Report:
    """Run the programs and count; problems without samples count as zero and are named."""
    num_seen = benchmark.num_shown(str(samples[0].prompt))
    form, num_fewshot = recorded_form(samples[0].settings, num_seen)
    refuse_other_prompts(samples, benchmark.prompts(num_fewshot, form), num_fewshot)
    counts = Counter(sample.task_id for sample in samples)
    rarest = min(counts, key=lambda task_id: counts[task_id])
    ks = judging.ks(counts[rarest], f"{rarest} has")
    with judging.open_sandbox() as sandbox:
        verdicts = verdicts_of(samples, benchmark, sandbox, judging, show_bar=show_bar)
    results = results_of(verdicts, list(benchmark.problems), ks, isolation=sandbox.isolation)
    return Report(
        task=task,
        results=results,
        protocol=benchmark.protocol(num_fewshot) | judging.limits | judging.packages,
        subject={"sampling": samples[0].settings},
        data_sha256=benchmark.data_sha256,
        summary=summary(results),
        verdicts=verdicts,
        is_timed=False,  # else scoring again would give another file
    )


def verdicts_of(
    samples: Sequence[Sample],
    benchmark: Benchmark,
    sandbox: Sandbox,
    judging: JudgingArguments,
    *,
    show_bar: bool = False,
) -> list[dict[str, Any]]:
    """The lines of verdicts.jsonl, in the order of the samples; equal programs are run once."""
    jobs = [replace(benchmark.program(s.task_id, s.completion), **judging.limits) for s in samples]
    distinct = list(dict.fromkeys(jobs))
    verdicts, packages = {}, judging.packages
    with closing(Progress("Judging", len(distinct), "program", is_shown=show_bar)) as progress:
        for job, verdict in zip(distinct, sandbox.check_all(distinct), strict=True):
            verdicts[job] = {
                "status": verdict.status,
                "detail": verdict.detail,
                "in_jail": verdict.in_jail,
                "program": job.program,
                **packages,
            }
            progress.advance()
    return [
        {"task_id": sample.task_id, "sample": sample.sample, **verdicts[job]}
        for sample, job in zip(samples, jobs, strict=True)
    ]
