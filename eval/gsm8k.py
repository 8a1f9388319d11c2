r"""Exact match on GSM8K, greedy, under three rules of judgement.

    python -m eval.gsm8k --model_name_or_path M [--delta F] [--data_dir D] --output_dir O
                         [--limit N] [--num_fewshot 5]

    strict-match        the first `#### (\-?[0-9\.\,]+)` of the output
    flexible-extract    the last `(-?[$0-9.,]{2,})|(-?[0-9]+)` of the output
                        each compared as a string with the reference, after both have lost commas,
                        dollar signs, everything through `#### ` and one trailing full stop
    numeric             the value of the final answer, exactly (`eval.final_answer`): 29.00 = 29

The first two follow the community harness (lm-evaluation-harness, task gsm8k) and bear its names;
so do the prompt, the stops and the worked problems of `--num_fewshot`: for each test problem in
turn, `random.Random(1234).sample` of the train split. The default is no worked problem, since a
model that was fine-tuned on the train split knows the form; the harness's default is 5.

    output_dir/
      samples.jsonl     what the model wrote (`eval.samples`)
      verdicts.jsonl    per problem: the three verdicts, and what numeric read and by which rule
      results.json      the counts, and what they were counted on
"""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from eval.completion import GenerationSettings
from eval.final_answer import final_answer
from eval.pass_at_k import CONFIDENCE, bootstrap_interval
from eval.provenance import sha256_of_files, sha256_of_texts, versions
from eval.samples import Sample
from eval.sampling import RESULTS_FILE, SamplingArguments, check_arguments, exit_for, sample_all
from gem_ds.comm import PeerError
from gem_ds.files import atomic_write, save_json
from gem_ds.tasks import Example, load_task

VERDICTS_FILE = "verdicts.jsonl"
STOP_STRINGS = ("Question:", "</s>", "<|im_end|>")
SHOT_SEED = 1234

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_NOT_FOUND = "[invalid]"  # the harness's word


@dataclass(frozen=True, kw_only=True)
class Gsm8kArguments:
    """The flags of this task."""

    num_fewshot: int = field(default=0, metadata={"help": "Worked problems before each prompt."})
    max_new_tokens: int = field(
        default=256, metadata={"help": "The longest completion, in tokens."}
    )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an output is right, under each of the three rules.

    Attributes:
        strict_match: Under the harness's rule of this name.
        flexible_extract: Under the harness's rule of this name.
        numeric: By value.
        rule: Which rule found the answer that `numeric` judges; None if there is none.
    """

    strict_match: bool
    flexible_extract: bool
    numeric: bool
    rule: str | None = field(default=None, compare=False)


#: The rules by the names under which they are reported, and their fields of `Verdict`.
RULES = {
    "strict-match": "strict_match",
    "flexible-extract": "flexible_extract",
    "numeric": "numeric",
}


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


def score(output: str, answer: str) -> Verdict:
    """Judge what a model wrote; raises nothing, whatever the two texts are.

    Args:
        output: The completion of a problem's prompt, whatever it is.
        answer: The dataset's answer, which ends in `#### <number>`, or the number alone.

    Returns:
        The three verdicts; an output in which a rule finds no answer is wrong under that rule.
    """
    reference = _normalised(answer)
    strict = _STRICT.search(output)
    flexible = [match[0] for match in _FLEXIBLE.finditer(output)]
    found, wanted = final_answer(output), final_answer(answer)
    return Verdict(
        strict_match=_normalised(strict[1] if strict else _NOT_FOUND) == reference,
        flexible_extract=_normalised(flexible[-1] if flexible else _NOT_FOUND) == reference,
        numeric=found is not None and wanted is not None and found.value == wanted.value,
        rule=None if found is None else found.rule,
    )


def load(data_dir: str | None, limit: int | None = None) -> Problems:
    """The first `limit` test problems, from a folder or from the Hub.

    Raises:
        ValueError: A file is at fault, or an answer could never be matched, so that every model
            would score zero on it.
    """
    task = load_task("gsm8k", data_dir=data_dir)
    for number, example in enumerate(task.test, start=1):
        if _STRICT.search(example.target) is None:
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


def tally(verdicts: Sequence[Verdict], total: int) -> dict[str, dict[str, Any]]:
    """By rule, how many problems are right, of how many, the share in [0, 1] and its interval.

    Args:
        verdicts: Of the problems that have a sample.
        total: All problems; one without a sample counts as wrong.
    """
    table: dict[str, dict[str, Any]] = {}
    for rule, name in RULES.items():
        values = [float(getattr(verdict, name)) for verdict in verdicts]
        values += [0.0] * (total - len(values))
        table[rule] = {
            "correct": int(sum(values)),
            "total": total,
            "accuracy": sum(values) / total,
            "confidence_interval": list(bootstrap_interval(values)),
        }
    return table


def summary(exact_match: Mapping[str, Mapping[str, Any]]) -> str:
    """The result line, from `tally`."""
    parts = [
        f"{rule} {counts['correct']}/{counts['total']} = {100 * counts['accuracy']:.1f} %"
        for rule, counts in exact_match.items()
    ]
    return "exact match: " + ", ".join(parts)


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
        SystemExit: Flags, model, delta or data are refused; its message is one sentence.
    """
    parser = HfArgumentParser(
        (SamplingArguments, Gsm8kArguments),  # type: ignore[arg-type]
        prog="python -m eval.gsm8k",
        description="Exact match of a causal language model on GSM8K, greedy.",
        allow_abbrev=False,
    )
    arguments, task = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    try:
        return _evaluate(arguments, task)
    except (ValueError, OSError, PeerError) as error:
        raise exit_for("eval.gsm8k", error) from error


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


def _normalised(text: str) -> str:
    """What the harness does to prediction and reference before it compares them."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()


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


if __name__ == "__main__":
    main()
