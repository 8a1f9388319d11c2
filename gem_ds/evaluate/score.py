"""Score a file of samples again, without a model.

    python -m eval.score --task gsm8k [--data_dir D] O/samples.jsonl
    python -m eval.score --task mbpp [--data_dir D] [--k 1 10] [--sanitized] O/samples.jsonl

It prints and writes what the evaluator did: results.json (and verdicts.jsonl) beside the samples,
or in --output_dir. The samples must be of the problems that the flags name, each with the prompt
that the protocol gives it, equally many of each, and all drawn with the same settings.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from gem_ds.evaluate import gsm8k
from gem_ds.evaluate.arguments import option
from gem_ds.evaluate.judging import Asked, JudgingArguments, load, open_sandbox, report
from gem_ds.evaluate.mbpp import SHOT_IDS, prompts_of
from gem_ds.evaluate.samples import Sample, read_samples


@dataclass(frozen=True, kw_only=True)
class ScoreArguments:
    """The flags that both tasks share."""

    task: Literal["gsm8k", "mbpp"] = field(metadata={"help": "What the samples are answers to."})
    data_dir: str | None = option(
        None, "Folder of the task's files; without it the task is loaded from the Hub."
    )
    output_dir: str | None = option(None, "Where results are written (default: by the samples).")
    limit: int | None = option(None, "Expect samples of the first so many problems only.")
    allow_missing: bool = option(
        False, "Count problems without samples as zero and name them, instead of refusing."
    )
    disable_tqdm: bool = option(False, "No progress bar.")

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit must be at least 1, not {self.limit}.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Score a file; returns what results.json holds.

    Raises:
        ValueError, OSError: Flags, samples, data or the host are refused, in one sentence.
    """
    parser = HfArgumentParser(
        (ScoreArguments, JudgingArguments),  # type: ignore[arg-type]
        prog="python -m eval.score",
        description="Score a file of samples again, without a model.",
        allow_abbrev=False,
    )
    parser.add_argument("samples", help="The file of samples, as first or last argument.")
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[-1].endswith(".jsonl"):  # behind `--k 1 10` it would be taken for another k
        words.insert(0, words.pop())
    arguments, judging, rest = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    score_task = {"gsm8k": _gsm8k, "mbpp": _mbpp}[arguments.task]
    return score_task(Path(rest.samples), arguments, judging)


def _gsm8k(path: Path, arguments: ScoreArguments, judging: JudgingArguments) -> dict[str, Any]:
    for flag in fields(judging):
        if getattr(judging, flag.name) != flag.default:
            raise ValueError(f"--{flag.name} has no meaning for --task gsm8k: leave it out.")
    problems = gsm8k.load(arguments.data_dir, arguments.limit)
    samples = _read(path, list(problems.test), arguments)
    return gsm8k.report(samples, problems, _output_dir(path, arguments))


def _mbpp(path: Path, arguments: ScoreArguments, judging: JudgingArguments) -> dict[str, Any]:
    asked = load(judging, arguments.data_dir, arguments.limit)
    samples = _read(path, list(asked.problems), arguments)
    num_fewshot = _num_fewshot(path, samples, asked, judging.prompt_template)
    ks = judging.ks(min(Counter(sample.task_id for sample in samples).values()), f"{path} has")
    with open_sandbox(judging) as sandbox:
        return report(
            samples,
            judging,
            asked,
            sandbox,
            _output_dir(path, arguments),
            ks=ks,
            num_fewshot=num_fewshot,
            show_bar=not arguments.disable_tqdm,
        )


def _num_fewshot(path: Path, samples: Sequence[Sample], asked: Asked, template: str | None) -> int:
    """How many shots the prompts show; refuses prompts that this dataset does not give."""
    dataset, problems = asked.dataset, asked.problems
    for num_fewshot in (0,) if template is not None else (3, 0):
        if num_fewshot and not all(shot in dataset.problems for shot in SHOT_IDS):
            continue
        prompts = prompts_of(problems, dataset, num_fewshot=num_fewshot, template=template)
        if all(sample.prompt == prompts[sample.task_id] for sample in samples):
            return num_fewshot
    raise ValueError(
        f"{path} holds other prompts than those of {dataset.source}: pass the --prompt_template "
        "and the --sanitized that the samples were drawn with."
    )


def _read(path: Path, task_ids: list[str], arguments: ScoreArguments) -> list[Sample]:
    """The samples, which must be of one run: else their score would be of no model."""
    samples = read_samples(path, task_ids=task_ids, allow_missing=arguments.allow_missing)
    for sample in samples:
        if sample.settings != samples[0].settings:
            raise ValueError(
                f"{path} mixes runs: sample {sample.sample} of {sample.task_id!r} was drawn with "
                "other settings than the first one; keep those of one run."
            )
    return samples


def _output_dir(path: Path, arguments: ScoreArguments) -> Path:
    folder = path.parent if arguments.output_dir is None else Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
