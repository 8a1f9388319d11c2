r"""Exact match on GSM8K, greedy, under three rules of judgement.

    python -m eval.gsm8k --model_name_or_path M [--delta F] [--data_dir D] --output_dir O
                         [--limit N] [--num_fewshot 5]

    prompt      Question: {question}\nAnswer:
    answer      one space, then the completion, of at most 256 tokens
    stops       `Question:`, `</s>`, `<|im_end|>`
    judged      by the three rules of `gem_ds.evaluate.exact_match`

Prompt, stops and the worked problems of `--num_fewshot` are those of the community harness
(lm-evaluation-harness, task gsm8k), to the byte: for each test problem in turn a
`random.Random(1234).sample` of the train split, with a blank line after each. The default is no
worked problem, since a model that was fine-tuned on the train split knows the form; the harness's
default is 5.

    output_dir/
      samples.jsonl     what the model wrote (`gem_ds.evaluate.samples`)
      verdicts.jsonl    per problem: the three verdicts, and the rule that found the number
      results.json      the counts, and what they were counted on
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from gem_ds.data.tasks import Example, load_task
from gem_ds.evaluate.arguments import SamplingArguments, check_arguments
from gem_ds.evaluate.completion import GenerationSettings
from gem_ds.evaluate.exact_match import RULES, Verdict, is_reference, score, summary, tally
from gem_ds.evaluate.pass_at_k import CONFIDENCE
from gem_ds.evaluate.provenance import sha256_of_files, sha256_of_texts, versions
from gem_ds.evaluate.samples import Sample
from gem_ds.evaluate.sampling import RESULTS_FILE, VERDICTS_FILE, sample_all
from gem_ds.files.atomic import atomic_write, save_json

__all__ = ["Verdict", "load", "main", "prompts_of", "report", "score"]

STOP_STRINGS = ("Question:", "</s>", "<|im_end|>")
SHOT_SEED = 1234


@dataclass(frozen=True, kw_only=True)
class Gsm8kArguments:
    """The flags of this task."""

    num_fewshot: int = field(default=0, metadata={"help": "Worked problems before each prompt."})
    max_new_tokens: int = field(
        default=256, metadata={"help": "The longest completion, in tokens."}
    )


@dataclass(frozen=True, kw_only=True)
class Problems:
    """The problems that are asked, and where worked ones are taken from.

    Attributes:
        test: By task id.
        train: The train split.
        sha256: Of the data, by file or by name.
    """

    test: dict[str, Example]
    train: list[Example]
    sha256: dict[str, str]


def load(data_dir: str | None, limit: int | None = None) -> Problems:
    """The first `limit` test problems, from a folder or from the Hub.

    Raises:
        ValueError: A file is at fault, or an answer could never be matched, so that every model
            would score zero on it.
    """
    task = load_task("gsm8k", data_dir=data_dir)
    for number, example in enumerate(task.test, start=1):
        if not is_reference(example.target):
            raise ValueError(
                f"Example {number} of the test split has no '#### <number>' in its answer, so "
                "nothing can be scored against it: add it."
            )
    if data_dir is not None:
        sha256 = sha256_of_files(Path(data_dir) / f"{split}.jsonl" for split in ("train", "test"))
    else:
        sha256 = {
            f"openai/gsm8k {name}": sha256_of_texts(f"{e.prompt}{e.target}" for e in split)
            for name, split in (("train", task.train), ("test", task.test))
        }
    test = {f"gsm8k/test/{i}": example for i, example in enumerate(task.test[:limit])}
    return Problems(test=test, train=task.train, sha256=sha256)


def prompts_of(problems: Problems, num_fewshot: int) -> dict[str, str]:
    """Task id to prompt, with the worked problems that the harness puts before it.

    Raises:
        ValueError: There are not so many worked problems.
    """
    if not 0 <= num_fewshot <= len(problems.train):
        raise ValueError(
            f"--num_fewshot must be at least 0 and at most {len(problems.train)}, the size of the "
            f"train split, not {num_fewshot}."
        )
    drawn = random.Random(SHOT_SEED)
    prompts = {}
    for task_id, example in problems.test.items():
        shots = drawn.sample(problems.train, num_fewshot)
        worked = "".join(f"{shot.prompt}{shot.target}\n\n" for shot in shots)
        prompts[task_id] = f"{worked}{example.prompt}"
    return prompts


def report(
    samples: Sequence[Sample], problems: Problems, output_dir: Path, **facts: Any
) -> dict[str, Any]:
    """Judge the samples, write verdicts.jsonl and results.json, print the result.

    Args:
        samples: One of each problem, drawn with the same settings; problems without one count as
            wrong and are named.
        problems: What was asked.
        output_dir: Where the files go.
        facts: Further entries of results.json.

    Returns:
        What results.json holds.

    Raises:
        ValueError: A problem has several samples, or prompts are not those of this data.
        OSError: A file cannot be written.
    """
    num_fewshot = _num_fewshot(samples, problems)
    verdicts = {
        sample.task_id: score(sample.completion, problems.test[sample.task_id].target)
        for sample in samples
    }
    exact_match = tally(list(verdicts.values()), len(problems.test))
    results = {
        "task": "gsm8k",
        "n": len(problems.test),
        "exact_match": exact_match,
        "confidence": CONFIDENCE,
        "numeric_found_by": dict(Counter(str(verdict.rule) for verdict in verdicts.values())),
        "without_samples": [task_id for task_id in problems.test if task_id not in verdicts],
        "protocol": {"split": "test", "num_fewshot": num_fewshot, "shot_seed": SHOT_SEED},
        "sampling": samples[0].settings,
        "data_sha256": problems.sha256,
        "versions": versions(),
        **facts,
    }
    (output_dir / RESULTS_FILE).unlink(missing_ok=True)  # never beside other verdicts
    _save_verdicts(output_dir / VERDICTS_FILE, samples, verdicts)
    save_json(output_dir / RESULTS_FILE, results)
    print(summary(exact_match))
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate a model; returns what results.json holds (on ranks other than the first nothing).

    Raises:
        ValueError, OSError: Flags, model, delta or data are refused, in one sentence.
    """
    parser = HfArgumentParser(
        (SamplingArguments, Gsm8kArguments),  # type: ignore[arg-type]
        prog="python -m eval.gsm8k",
        description="Exact match of a causal language model on GSM8K, greedy.",
        allow_abbrev=False,
    )
    arguments, task = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return _evaluate(arguments, task)


def _evaluate(arguments: SamplingArguments, task: Gsm8kArguments) -> dict[str, Any]:
    started = time.perf_counter()
    check_arguments(arguments)
    settings = GenerationSettings(max_new_tokens=task.max_new_tokens, stop_strings=STOP_STRINGS)
    problems = load(arguments.data_dir, arguments.limit)
    samples = sample_all(arguments, prompts_of(problems, task.num_fewshot), settings)
    if samples is None:
        return {}
    seconds = round(time.perf_counter() - started, 1)
    return report(samples, problems, Path(arguments.output_dir), seconds=seconds)


def _num_fewshot(samples: Sequence[Sample], problems: Problems) -> int:
    """How many worked problems the prompts show; refuses prompts that this data does not give."""
    num_fewshot = str(samples[0].prompt).count("\n\nQuestion: ")
    is_possible = num_fewshot <= len(problems.train)
    prompts = prompts_of(problems, num_fewshot) if is_possible else {}
    for task_id, count in Counter(sample.task_id for sample in samples).items():
        if count > 1:
            raise ValueError(
                f"GSM8K is scored on one sample of each problem, and {task_id} has {count}: keep "
                "one of them."
            )
    for sample in samples:
        if sample.prompt != prompts.get(sample.task_id):
            raise ValueError(
                f"The prompt of {sample.task_id} is not what these data and {num_fewshot} worked "
                "problems give: pass the data that the samples were drawn for."
            )
    return num_fewshot


def _save_verdicts(path: Path, samples: Sequence[Sample], verdicts: dict[str, Verdict]) -> None:
    lines = []
    for sample in samples:
        verdict = verdicts[sample.task_id]
        judged = {name: getattr(verdict, name) for name in RULES.values()}
        lines.append(json.dumps({"task_id": sample.task_id, **judged, "rule": verdict.rule}))
    payload = "".join(f"{line}\n" for line in lines).encode()
    atomic_write(path, lambda temporary: temporary.write_bytes(payload))
