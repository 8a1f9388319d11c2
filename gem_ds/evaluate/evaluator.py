"""One frame for every evaluator of written answers, from flags to results.json.

    flags -> Asked -> samples.jsonl -> Report -> verdicts.jsonl, results.json, a line or two
             prompts, stops            judgements and counts

An evaluator fills in its protocol: what is asked (`Asked`), and what samples are worth (`Report`).
`eval.score` enters at samples.jsonl. What is chosen and not written (`evaluate.classification`)
shares the last step only.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gem_ds.evaluate.arguments import SamplingArguments, check_arguments, parser_of
from gem_ds.evaluate.generation import GenerationSettings, Prompt
from gem_ds.evaluate.provenance import versions
from gem_ds.evaluate.samples import Sample
from gem_ds.evaluate.sampling import RESULTS_FILE, VERDICTS_FILE, sample_all
from gem_ds.files.atomic import atomic_write, save_json
from gem_ds.progress import loading_bars


@dataclass(frozen=True, kw_only=True)
class Report:
    """What samples are worth.

    Attributes:
        task: The benchmark.
        results: Its own entries of results.json: counts and metrics.
        protocol: How it asked and judged.
        data_sha256: Of the data, by file or by name.
        summary: The result for the reader.
        verdicts: The lines of verdicts.jsonl; None where there is no such file.
    """

    task: str
    results: Mapping[str, Any]
    protocol: Any
    data_sha256: Mapping[str, str]
    summary: str
    verdicts: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What an evaluator wants to be written, and what it makes of that.

    Attributes:
        prompts: By task id.
        settings: How completions are made.
        report: Judges the samples; raises ValueError where they are not of these prompts.
        num_samples: Samples of each prompt.
        is_timed: Whether results.json tells the seconds, and so differs from run to run.
    """

    prompts: Mapping[str, Prompt]
    settings: GenerationSettings
    report: Callable[[Sequence[Sample]], Report]
    num_samples: int = 1
    is_timed: bool = True


def evaluate(
    program: str,
    description: str,
    flags: Sequence[type],
    ask: Callable[..., Asked],
    argv: Sequence[str] | None,
) -> dict[str, Any]:
    """Evaluate a model: sample, judge, write the files and print the result.

    Args:
        program: For the help, as `description`.
        description: What it does.
        flags: The dataclasses of the evaluator's own flags.
        ask: Receives the shared flags and its own.
        argv: The flags; None takes those of this process.

    Returns:
        What results.json holds; nothing on every rank but the first.

    Raises:
        ValueError: Flags, model, delta, data or the host are refused; in one sentence.
        OSError: A file cannot be read or written.
        PeerError: Another rank tells what went wrong.
    """
    parser = parser_of(program, description, SamplingArguments, *flags)
    arguments, *own = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    started = time.perf_counter()
    check_arguments(arguments)
    is_main = int(os.environ.get("RANK", 0)) == 0
    with loading_bars(is_shown=is_main and not arguments.disable_tqdm):
        asked = ask(arguments, *own)
        samples = sample_all(
            arguments, asked.prompts, asked.settings, num_samples=asked.num_samples
        )
    if samples is None:
        return {}
    report = asked.report(samples)
    seconds = round(time.perf_counter() - started, 1)
    facts = {"seconds": seconds} if asked.is_timed else {}
    return save_report(Path(arguments.output_dir), report, samples[0].settings, **facts)


def save_report(
    folder: Path, report: Report, settings: Mapping[str, Any], **facts: Any
) -> dict[str, Any]:
    """Write verdicts.jsonl and results.json, print the summary; returns what results.json holds."""
    results = {
        "task": report.task,
        **report.results,
        "protocol": report.protocol,
        "sampling": settings,
        "data_sha256": report.data_sha256,
        "versions": versions(),
        **facts,
    }
    (folder / RESULTS_FILE).unlink(missing_ok=True)  # never beside other verdicts
    if report.verdicts is not None:
        payload = "".join(json.dumps(verdict) + "\n" for verdict in report.verdicts).encode()
        atomic_write(folder / VERDICTS_FILE, lambda path: path.write_bytes(payload))
    save_json(folder / RESULTS_FILE, results)
    print(report.summary)
    return results


def refuse_other_prompts(
    samples: Sequence[Sample], prompts: Mapping[str, Prompt], num_fewshot: int
) -> None:
    """Raise ValueError if a sample answers another prompt than that of its problem."""
    for sample in samples:
        if sample.prompt != prompts.get(sample.task_id):
            raise ValueError(
                f"The prompt of {sample.task_id} is not what these data and {num_fewshot} worked "
                "problems give: pass the data that the samples were drawn for, and the flags that "
                "changed its form."
            )


def metrics_line(metrics: Mapping[str, float]) -> str:
    """Metrics as they are printed."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
