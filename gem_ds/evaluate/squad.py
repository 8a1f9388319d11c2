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

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from gem_ds.data.metrics import read_number, score
from gem_ds.data.tasks import Example, load_task
from gem_ds.evaluate.arguments import SamplingArguments, check_arguments
from gem_ds.evaluate.completion import GenerationSettings
from gem_ds.evaluate.provenance import sha256_of_texts, versions
from gem_ds.evaluate.samples import Sample
from gem_ds.evaluate.sampling import RESULTS_FILE, VERDICTS_FILE, sample_all
from gem_ds.files.atomic import atomic_write, save_json

PROTOCOL = "zero-shot, greedy, the rest of the line after the prompt"


@dataclass(frozen=True, kw_only=True)
class ShortAnswerArguments:
    """The flags of this evaluator."""

    task: Literal["squad", "stsb"] = field(default="squad", metadata={"help": "What is asked."})
    max_new_tokens: int = field(default=32, metadata={"help": "The longest answer, in tokens."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate a model; returns what results.json holds (on ranks other than the first nothing).

    Raises:
        ValueError, OSError: Flags, model, delta or data are refused, in one sentence.
    """
    parser = HfArgumentParser(
        (SamplingArguments, ShortAnswerArguments),  # type: ignore[arg-type]
        prog="python -m eval.squad",
        description="Metrics of a causal language model on short answers.",
        allow_abbrev=False,
    )
    arguments, own = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return _evaluate(arguments, own)


def _evaluate(arguments: SamplingArguments, own: ShortAnswerArguments) -> dict[str, Any]:
    started = time.perf_counter()
    check_arguments(arguments)
    settings = GenerationSettings(max_new_tokens=own.max_new_tokens, stop_strings=("\n",))
    task = load_task(own.task, data_dir=arguments.data_dir)
    examples = task.test[: arguments.limit]
    if not examples:
        raise ValueError(f"--task {own.task} has no held-out examples: check the folder.")
    prompts = {f"{own.task}/test/{i}": example.prompt for i, example in enumerate(examples)}
    samples = sample_all(arguments, prompts, settings)
    if samples is None:
        return {}
    answers: list[Any] = [sample.completion.strip() for sample in samples]
    output_dir = Path(arguments.output_dir)
    (output_dir / RESULTS_FILE).unlink(missing_ok=True)  # never beside other verdicts
    if task.kind == "number":
        answers = [read_number(answer) for answer in answers]
    else:
        _save_verdicts(output_dir / VERDICTS_FILE, own.task, samples, examples, answers)
    results: dict[str, Any] = {
        "task": own.task,
        "n": len(examples),
        "metrics": score(own.task, examples, answers),
        "protocol": PROTOCOL,
        "sampling": samples[0].settings,
        "data_sha256": {
            f"{own.task} test": sha256_of_texts(json.dumps(asdict(e)) for e in examples)
        },
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    save_json(output_dir / RESULTS_FILE, results)
    print(", ".join(f"{name} {value:.4f}" for name, value in results["metrics"].items()))
    return results


def _save_verdicts(
    path: Path,
    task: str,
    samples: Sequence[Sample],
    examples: Sequence[Example],
    answers: Sequence[str],
) -> None:
    """Write the metrics of each answer by itself; those of the task are their means."""
    lines = [
        json.dumps({"task_id": sample.task_id, **score(task, [example], [answer])})
        for sample, example, answer in zip(samples, examples, answers, strict=True)
    ]
    payload = "".join(f"{line}\n" for line in lines).encode()
    atomic_write(path, lambda temporary: temporary.write_bytes(payload))
