r"""Exact match on GSM8K, greedy, under three rules of judgement.

    python -m eval.gsm8k --model_name_or_path M [--delta F] [--data_dir D] --output_dir O
                         [--limit N] [--num_fewshot 5] [--apply_chat_template]

    prompt      Question: {question}\nAnswer:
    answer      one space, then the completion, of at most 256 tokens
    stops       `Question:`, `</s>`, `<|im_end|>`

    strict-match        the first `#### (\-?[0-9\.\,]+)` of the output
    flexible-extract    the last `(-?[$0-9.,]{2,})|(-?[0-9]+)` of the output
                        each compared as a string with the reference, after both have lost commas,
                        dollar signs, everything through `#### ` and one trailing full stop
    numeric             the value of the final answer, exactly (`evaluate.final_answer`): 29.00 = 29

Prompt, stops, the first two rules and the worked problems of `--num_fewshot` are those of the
community harness (lm-evaluation-harness, task gsm8k), to the byte: for each test problem in turn a
`random.Random(1234).sample` of the train split, with a blank line after each. The default is none,
since a model that was fine-tuned on the train split knows the form; the harness's default is 5.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gem_ds.data.tasks import Example, Prompt, load_task
from gem_ds.evaluate.evaluator import Report, evaluate, refuse_other_prompts, sha256_of_texts
from gem_ds.evaluate.final_answer import final_answer
from gem_ds.evaluate.generation import GenerationSettings
from gem_ds.evaluate.model import SamplingArguments
from gem_ds.evaluate.pass_at_k import CONFIDENCE, bootstrap_interval
from gem_ds.evaluate.prompt_form import DEFAULT_FORM, PromptForm, recorded_form
from gem_ds.evaluate.samples import Sample
from gem_ds.evaluate.sampling import sample_all
from gem_ds.files.digests import digest_of_file
from gem_ds.flags import option

STOP_STRINGS = ("Question:", "</s>", "<|im_end|>")
SHOT_SEED = 1234
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_NOT_FOUND = "[invalid]"  # the harness's word


@dataclass(frozen=True, kw_only=True)
class Gsm8kArguments:
    """The flags of this task."""

    num_fewshot: int = option(0, "Worked problems before each prompt.")
    max_new_tokens: int = option(256, "The longest completion, in tokens.")


@dataclass(frozen=True, kw_only=True)
class Problems:
    """The problems that are asked, by task id, the train split, and the data's SHA-256 by name."""

    test: dict[str, Example]
    train: list[Example]
    sha256: dict[str, str]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate a model, as `gem_ds.evaluate.evaluator.evaluate`."""
    about = "Exact match of a causal language model on GSM8K, greedy."
    return evaluate("eval gsm8k", about, [Gsm8kArguments, PromptForm], _judge, argv)


def _judge(arguments: SamplingArguments, own: Gsm8kArguments, form: PromptForm) -> Report | None:
    settings = GenerationSettings(max_new_tokens=own.max_new_tokens, stop_strings=STOP_STRINGS)
    problems = load(arguments.data_dir, arguments.limit)
    prompts = prompts_of(problems, own.num_fewshot, form)
    samples = sample_all(arguments, prompts, settings, form=form.recorded(own.num_fewshot))
    return None if samples is None else report(problems, samples)


def load(data_dir: str | None, limit: int | None = None) -> Problems:
    """The first `limit` test problems, from a folder or from the Hub.

    An answer that could never be matched is refused: every model would score zero on it.
    """
    task = load_task("gsm8k", data_dir=data_dir)
    for number, example in enumerate(task.test, start=1):
        if _STRICT.search(example.target) is None:
            raise ValueError(
                f"Example {number} of the test split has no '#### <number>' in its answer, so "
                "nothing can be scored against it: add it."
            )
    sha256 = {}
    for name, split in (("train", task.train), ("test", task.test)):
        if data_dir is None:
            texts = (f"{example.prompt}{example.target}" for example in split)
            sha256[f"openai/gsm8k {name}"] = sha256_of_texts(texts)
        else:
            sha256[f"{name}.jsonl"] = digest_of_file(Path(data_dir, f"{name}.jsonl"))
    test = {f"gsm8k/test/{i}": example for i, example in enumerate(task.test[:limit])}
    return Problems(test=test, train=task.train, sha256=sha256)


def prompts_of(
    problems: Problems, num_fewshot: int, form: PromptForm = DEFAULT_FORM
) -> dict[str, Prompt]:
    """Task id to prompt, with the worked problems that the harness puts before it."""
    if not 0 <= num_fewshot <= len(problems.train):
        raise ValueError(
            f"--num_fewshot must be at least 0 and at most {len(problems.train)}, the size of the "
            f"train split, not {num_fewshot}."
        )
    drawn = random.Random(SHOT_SEED)
    prompts = {}
    for task_id, example in problems.test.items():
        shots = drawn.sample(problems.train, num_fewshot)
        worked = [(str(shot.prompt), shot.target.removeprefix(" ")) for shot in shots]
        prompts[task_id] = form.prompt(str(example.prompt), worked, delimiter=" ")
    return prompts


def report(problems: Problems, samples: Sequence[Sample]) -> Report:
    """Judge one sample of each problem; problems without one count as wrong and are named."""
    for task_id, count in Counter(sample.task_id for sample in samples).items():
        if count > 1:
            raise ValueError(
                f"GSM8K is scored on one sample of each problem, and {task_id} has {count}: keep "
                "one of them."
            )
    num_seen = str(samples[0].prompt).count("\n\nQuestion: ")
    form, num_fewshot = recorded_form(samples[0].settings, num_seen)
    is_possible = 0 <= num_fewshot <= len(problems.train)
    prompts = prompts_of(problems, num_fewshot, form) if is_possible else {}
    refuse_other_prompts(samples, prompts, num_fewshot)
    matches = {s.task_id: compare(s.completion, problems.test[s.task_id].target) for s in samples}
    exact_match = tally(list(matches.values()), len(problems.test))
    return Report(
        task="gsm8k",
        results={
            "n": len(problems.test),
            "exact_match": exact_match,
            "confidence": CONFIDENCE,
            "numeric_found_by": dict(Counter(str(match.rule) for match in matches.values())),
            "without_samples": [task_id for task_id in problems.test if task_id not in matches],
        },
        protocol={"split": "test", "num_fewshot": num_fewshot, "shot_seed": SHOT_SEED},
        subject={"sampling": samples[0].settings},
        data_sha256=problems.sha256,
        summary=summary(exact_match),
        verdicts=[{"task_id": task_id, **asdict(match)} for task_id, match in matches.items()],
    )


@dataclass(frozen=True, kw_only=True)
class Match:
    """Whether an output is right under each of the three rules, and what found its number."""

    strict_match: bool
    flexible_extract: bool
    numeric: bool
    rule: str | None = field(default=None, compare=False)


#: The rules by the names under which they are reported, and their fields of `Match`.
RULES = {name.replace("_", "-"): name for name in ("strict_match", "flexible_extract", "numeric")}


def compare(output: str, answer: str) -> Match:
    """Judge what a model wrote; `answer` is the dataset's, or the number at its end alone."""
    reference = _normalised(answer)
    strict = _STRICT.search(output)
    flexible = [match[0] for match in _FLEXIBLE.finditer(output)]
    found, wanted = final_answer(output), final_answer(answer)
    return Match(
        strict_match=_normalised(strict[1] if strict else _NOT_FOUND) == reference,
        flexible_extract=_normalised(flexible[-1] if flexible else _NOT_FOUND) == reference,
        numeric=found is not None and wanted is not None and found.value == wanted.value,
        rule=None if found is None else found.rule,
    )


def tally(matches: Sequence[Match], total: int) -> dict[str, dict[str, Any]]:
    """By rule, how many of `total` problems are right, their share and its interval."""
    table: dict[str, dict[str, Any]] = {}
    for rule, name in RULES.items():
        values = [float(getattr(match, name)) for match in matches] + [0.0] * (total - len(matches))
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


def _normalised(text: str) -> str:
    """What the harness does to prediction and reference before it compares them."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()
