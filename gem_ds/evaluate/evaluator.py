"""One frame for every evaluator, from flags to results.json.

    flags -> samples.jsonl -> Report -> verdicts.jsonl, results.json, a line or two

An evaluator asks its prompts and makes a `Report` of what comes back. `eval.score` enters at
samples.jsonl; what is chosen and not written (`evaluate.classification`) leaves that file out.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gem_ds.data.tasks import Example
from gem_ds.evaluate.generation import Prompt
from gem_ds.evaluate.model import SamplingArguments, check_arguments
from gem_ds.evaluate.samples import Sample
from gem_ds.evaluate.sampling import RESULTS_FILE, VERDICTS_FILE
from gem_ds.files.atomic import locked, make_folder, save_json, save_jsonl
from gem_ds.flags import parser_of
from gem_ds.progress import loading_bars

_PACKAGES = ("gem_ds", "torch", "transformers", "tokenizers", "deepspeed", "peft", "vllm")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a model's answers are worth."""

    task: str
    results: Mapping[str, Any]  # its own entries of results.json: counts and metrics
    protocol: Any  # how it asked and judged
    subject: Mapping[str, Any]  # entries on what has answered: settings of sampling, or the model
    data_sha256: Mapping[str, str]  # by file or by name
    summary: str  # for the reader
    verdicts: Sequence[Mapping[str, Any]] | None = None  # lines of verdicts_file, if there is one
    verdicts_file: str = VERDICTS_FILE
    is_timed: bool = True  # whether results.json tells the seconds, and so differs from run to run


def evaluate(
    program: str,
    description: str,
    flags: Sequence[type],
    judge: Callable[..., Report | None],
    argv: Sequence[str] | None,
) -> dict[str, Any]:
    """Evaluate a model; returns what results.json holds, nothing on every rank but the first.

    `judge` receives the shared flags and its own, and gives None on every rank but the first. What
    is refused is a ValueError or OSError of one sentence; a PeerError where another rank tells it.
    """
    parser = parser_of(program, description, SamplingArguments, *flags)
    arguments, *own = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    started = time.perf_counter()
    check_arguments(arguments)
    is_main = int(os.environ.get("RANK", 0)) == 0
    folder = Path(arguments.output_dir)
    with folder_of_one_evaluation(folder) if is_main else nullcontext():
        with loading_bars(is_shown=is_main and not arguments.disable_tqdm):
            report = judge(arguments, *own)
        if report is None:
            return {}
        seconds = round(time.perf_counter() - started, 1)
        return save_report(folder, report, **({"seconds": seconds} if report.is_timed else {}))


@contextmanager
def folder_of_one_evaluation(folder: Path) -> Iterator[None]:
    """Make the folder, and hold it against a second writer while the block lasts.

    A new one that is left empty, since the block refuses its arguments, is removed.
    """
    is_new = not folder.exists()
    make_folder(folder)
    with locked(folder) as is_free:
        try:
            if not is_free:
                raise ValueError(
                    f"Another run or evaluation writes to --output_dir {folder}: wait for its end, "
                    "or name another folder."
                )
            yield
        finally:
            if is_new:
                with suppress(OSError):  # it is not empty
                    folder.rmdir()


def save_report(folder: Path, report: Report, **facts: Any) -> dict[str, Any]:
    """Write verdicts and results.json, print the summary; returns what results.json holds."""
    results = {
        "task": report.task,
        **report.results,
        "protocol": report.protocol,
        **report.subject,
        "data_sha256": report.data_sha256,
        "versions": versions(),
        **facts,
    }
    (folder / RESULTS_FILE).unlink(missing_ok=True)  # never beside other verdicts
    if report.verdicts is not None:
        save_jsonl(folder / report.verdicts_file, report.verdicts)
    save_json(folder / RESULTS_FILE, results)
    print(report.summary)
    return results


def versions() -> dict[str, str]:
    """Of Python and the packages that are installed, and the device that torch uses."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def sha256_of_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts in their order, for data that do not lie in a file."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()


def held_out(task: str, examples: Sequence[Example], limit: int | None) -> Sequence[Example]:
    """The first `limit` of a task's held-out examples, of which there must be some."""
    if not examples:
        raise ValueError(f"--task {task} has no held-out examples: check the folder.")
    return examples[:limit]


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


def metrics_report(
    task: str, examples: Sequence[Example], metrics: Mapping[str, float], **more: Any
) -> Report:
    """The report on a task's metrics; its data are the examples, but not where they stand."""
    fields = ({k: v for k, v in asdict(e).items() if k != "place"} for e in examples)
    return Report(
        task=task,
        results={"n": len(examples), "metrics": metrics},
        data_sha256={f"{task} test": sha256_of_texts(json.dumps(values) for values in fields)},
        summary=", ".join(f"{name} {value:.4f}" for name, value in metrics.items()),
        **more,
    )
