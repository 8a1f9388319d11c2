"""Score a file of samples again, without a model.

    python -m eval.score --task gsm8k [--data_dir D] O/samples.jsonl
    python -m eval.score --task mbpp [--data_dir D] [--k 1 10] [--sanitized] O/samples.jsonl

It prints and writes what the evaluator did: results.json (and verdicts.jsonl) beside the samples,
or in --output_dir. The samples must be of the problems that the flags name, each with the prompt
that the protocol gives it, equally many of each, and all drawn with the same settings.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gem_ds.evaluate import gsm8k, passk
from gem_ds.evaluate.evaluator import folder_of_one_evaluation, save_report
from gem_ds.evaluate.samples import read_samples
from gem_ds.flags import option, parser_of, refuse_below_one


@dataclass(frozen=True, kw_only=True)
class ScoreArguments:
    """The flags that all tasks share."""

    task: str = field(
        metadata={"help": "What the samples are answers to.", "choices": ["gsm8k", *passk.TASKS]}
    )
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
        refuse_below_one(limit=self.limit)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Score a file; returns what results.json holds, and raises as `evaluator.evaluate`."""
    parser = parser_of(
        "eval score",
        "Score a file of samples again, without a model.",
        *(ScoreArguments, passk.JudgingArguments, *passk.OWN_FLAGS),
    )
    parser.add_argument("samples", help="The file of samples, as first or last argument.")
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[-1].endswith(".jsonl"):  # behind `--k 1 10` it would be taken for another k
        words.insert(0, words.pop())
    arguments, *flags, rest = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    task, path = arguments.task, Path(rest.samples)
    if task == "gsm8k":
        for given in flags:
            passk.refuse_changed(given, task)
        problems = gsm8k.load(arguments.data_dir, arguments.limit)
        task_ids, report = list(problems.test), partial(gsm8k.report, problems)
    else:
        judging, *own = flags
        benchmark = passk.load(task, arguments.data_dir, arguments.limit, own)
        show_bar = not arguments.disable_tqdm
        report = partial(passk.report, task, benchmark, judging=judging, show_bar=show_bar)
        task_ids = list(benchmark.problems)
    folder = path.parent if arguments.output_dir is None else Path(arguments.output_dir)
    with folder_of_one_evaluation(folder):
        samples = read_samples(path, task_ids, allow_missing=arguments.allow_missing)
        return save_report(folder, report(samples))
