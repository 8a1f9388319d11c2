"""Short answers that a causal model writes: SQuAD, and the numbers of STS-B.

    python -m eval.squad [--task squad|stsb] --model_name_or_path M [--delta F] [--adapter DIR]
                         [--data_dir D] --output_dir O [--limit N]

Greedy, zero-shot; an answer is the rest of the line after the prompt, of at most 32 tokens. Of a
number the first one in the line counts (`gem_ds.data.metrics.read_number`).

    output_dir/
      samples.jsonl     what the model wrote (`gem_ds.evaluate.samples`)
      verdicts.jsonl    squad: each answer's metrics, for intervals
      results.json      the metrics, and what they were measured on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gem_ds.data.metrics import read_number, score
from gem_ds.data.tasks import Example, load_task
from gem_ds.evaluate.arguments import SamplingArguments, option
from gem_ds.evaluate.evaluator import Asked, Report, evaluate, metrics_line
from gem_ds.evaluate.generation import GenerationSettings
from gem_ds.evaluate.provenance import sha256_of_examples
from gem_ds.evaluate.samples import Sample

PROTOCOL = "zero-shot, greedy, the rest of the line after the prompt"


@dataclass(frozen=True, kw_only=True)
class ShortAnswerArguments:
    """The flags of this evaluator."""

    task: Literal["squad", "stsb"] = option("squad", "What is asked.")
    max_new_tokens: int = option(32, "The longest answer, in tokens.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate a model, as `gem_ds.evaluate.evaluator.evaluate`."""
    about = "Metrics of a causal language model on short answers."
    return evaluate("eval.squad", about, [ShortAnswerArguments], _ask, argv)


def _ask(arguments: SamplingArguments, own: ShortAnswerArguments) -> Asked:
    settings = GenerationSettings(max_new_tokens=own.max_new_tokens, stop_strings=("\n",))
    task = load_task(own.task, data_dir=arguments.data_dir)
    examples = task.test[: arguments.limit]
    if not examples:
        raise ValueError(f"--task {own.task} has no held-out examples: check the folder.")
    return Asked(
        prompts={f"{own.task}/test/{i}": example.prompt for i, example in enumerate(examples)},
        settings=settings,
        report=lambda samples: _report(own.task, examples, samples, task.kind == "number"),
    )


def _report(
    task: str, examples: Sequence[Example], samples: Sequence[Sample], is_number: bool
) -> Report:
    """Metrics of the task, and of each text by itself: those of the task are their means."""
    answers: list[Any] = [sample.completion.strip() for sample in samples]
    verdicts = None
    if is_number:
        answers = [read_number(answer) for answer in answers]
    else:
        verdicts = [
            {"task_id": sample.task_id, **score(task, [example], [answer])}
            for sample, example, answer in zip(samples, examples, answers, strict=True)
        ]
    metrics = score(task, examples, answers)
    return Report(
        task=task,
        results={"n": len(examples), "metrics": metrics},
        protocol=PROTOCOL,
        data_sha256=sha256_of_examples(task, examples),
        summary=metrics_line(metrics),
        verdicts=verdicts,
    )
