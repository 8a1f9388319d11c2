"""Short answers that a causal model writes: SQuAD, and the numbers of STS-B.

    python -m eval.squad [--task squad|stsb] --model_name_or_path M [--delta F] [--adapter DIR]
                         [--data_dir D] --output_dir O [--limit N]

Greedy, zero-shot; an answer is the rest of the line after the prompt, of at most 32 tokens. Of a
number the first one in the line counts (`gem_ds.data.metrics.read_number`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gem_ds.data.metrics import read_number, score
from gem_ds.data.tasks import load_task
from gem_ds.evaluate.evaluator import Report, evaluate, held_out, metrics_report
from gem_ds.evaluate.generation import GenerationSettings
from gem_ds.evaluate.model import SamplingArguments
from gem_ds.evaluate.sampling import sample_all
from gem_ds.flags import option


@dataclass(frozen=True, kw_only=True)
class ShortAnswerArguments:
    """The flags of this evaluator."""

    task: Literal["squad", "stsb"] = option("squad", "What is asked.")
    max_new_tokens: int = option(32, "The longest answer, in tokens.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate a model, as `gem_ds.evaluate.evaluator.evaluate`."""
    about = "Metrics of a causal language model on short answers."
    return evaluate("eval squad", about, [ShortAnswerArguments], _judge, argv)


def _judge(arguments: SamplingArguments, own: ShortAnswerArguments) -> Report | None:
    settings = GenerationSettings(max_new_tokens=own.max_new_tokens, stop_strings=("\n",))
    task = load_task(own.task, data_dir=arguments.data_dir)
    examples = held_out(own.task, task.test, arguments.limit)
    prompts = {f"{own.task}/test/{i}": example.prompt for i, example in enumerate(examples)}
    samples = sample_all(arguments, prompts, settings)
    if samples is None:
        return None
    answers: list[Any] = [sample.completion.strip() for sample in samples]
    verdicts = None
    if task.kind == "number":
        answers = [read_number(answer) for answer in answers]
    else:  # metrics of each text by itself: those of the task are their means
        verdicts = [
            {"task_id": sample.task_id, **score(own.task, [example], [answer])}
            for sample, example, answer in zip(samples, examples, answers, strict=True)
        ]
    return metrics_report(
        own.task,
        examples,
        score(own.task, examples, answers),
        protocol="zero-shot, greedy, the rest of the line after the prompt",
        subject={"sampling": samples[0].settings},
        verdicts=verdicts,
    )
