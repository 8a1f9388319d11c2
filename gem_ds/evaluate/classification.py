"""Metrics of tasks whose answers are chosen: labels, choices, and the numbers of encoders.

    python -m eval.classification --task rte --model_name_or_path M [--delta F] [--adapter DIR]
                                  [--data_dir D] --output_dir O [--limit N] [--max_length 1024]

A causal model predicts the candidate whose tokens have the highest mean log-likelihood after the
prompt (`gem_ds.models.choices`), an encoder what its classification head says.

    output_dir/
      predictions.jsonl   what was predicted for each example (`gem_ds.data.predictions`)
      results.json        the metrics, and what they were measured on
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import transformers

from gem_ds.data.dataset import Dataset
from gem_ds.data.metrics import score
from gem_ds.data.predictions import PREDICTIONS_FILE, save_predictions
from gem_ds.data.tasks import TaskData, load_task
from gem_ds.evaluate.arguments import (
    SamplingArguments,
    check_arguments,
    option,
    parser_of,
    sparing_memory,
)
from gem_ds.evaluate.evaluator import metrics_line
from gem_ds.evaluate.provenance import model_facts, sha256_of_examples, versions
from gem_ds.evaluate.sampling import RESULTS_FILE, deepspeed_config, joined_ranks, load_model
from gem_ds.files.atomic import make_folder, save_json
from gem_ds.models.choices import predict_all
from gem_ds.models.encoders import is_encoder, num_positions
from gem_ds.models.load import ModelFiles, open_model
from gem_ds.models.objective import Predictor, objective_of
from gem_ds.models.tokenizer import pad_token_id, refuse_foreign_tokens

RANKING = (
    "zero-shot; the candidate of the highest mean token log-likelihood after the prompt, without "
    "an eos; ties to the first"
)
HEAD = "the largest output of the classification head, or its output where that is a number"


@dataclass(frozen=True, kw_only=True)
class ClassificationArguments:
    """The flags of this evaluator."""

    task: str = field(metadata={"help": "What is classified, for instance rte."})
    max_length: int = option(
        1024, "Tokens that the model reads; an encoder's longer texts are cut, others refused."
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is known before any weight is loaded."""

    files: ModelFiles
    task: TaskData
    predictor: Predictor
    questions: Dataset
    max_length: int  # as asked for, or the model's positions if those are fewer
    pad_token_id: int


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate a model; returns what results.json holds (on ranks other than the first nothing).

    Raises:
        ValueError: Flags, model, delta or data are refused; in one sentence.
        OSError: A file cannot be read or written.
        PeerError: Another rank tells what went wrong.
    """
    about = "Metrics of a language model on a classification task."
    flags = (SamplingArguments, ClassificationArguments)
    parser = parser_of("eval.classification", about, *flags)
    arguments, own = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    started = time.perf_counter()
    check_arguments(arguments)
    _check(arguments, own)
    transformers.utils.logging.set_verbosity_error()  # it would report that a new head is new
    with joined_ranks(arguments) as comm:
        with comm.agreement():
            plan = _plan(arguments, own)
            deepspeed = deepspeed_config(arguments, plan.files)
        model = load_model(plan.files, deepspeed, comm)
        with comm.agreement():
            if comm.is_main:
                make_folder(str(arguments.output_dir))
        with sparing_memory(f"{arguments.batch_size} examples and all their candidates"):
            predictions = predict_all(
                model,
                plan.questions,
                plan.predictor.predict,
                comm,
                batch_size=arguments.batch_size,
                pad_token_id=plan.pad_token_id,
            )
        results: dict[str, Any] = {}
        with comm.agreement():
            if comm.is_main:
                seconds = round(time.perf_counter() - started, 1)
                results = _report(arguments, own, plan, predictions) | {"seconds": seconds}
                save_json(Path(arguments.output_dir, RESULTS_FILE), results)
                print(metrics_line(results["metrics"]))
    return results


def _check(arguments: SamplingArguments, own: ClassificationArguments) -> None:
    if arguments.backend != "transformers":
        raise ValueError("--backend vllm is for what is generated: leave it out.")
    if own.max_length < 1:
        raise ValueError(f"--max_length must be at least 1, not {own.max_length}.")
    there = Path(arguments.output_dir, PREDICTIONS_FILE)
    if there.exists() and not arguments.overwrite_output_dir:
        raise ValueError(
            f"{there} is there already: pass --overwrite_output_dir to replace it, or another "
            "--output_dir."
        )


def _plan(arguments: SamplingArguments, own: ClassificationArguments) -> _Plan:
    """Reads all but the weights; refuses what can be refused by then."""
    task = load_task(own.task, data_dir=arguments.data_dir)
    task = replace(task, train=[], test=task.test[: arguments.limit])
    if not task.test:
        raise ValueError(f"--task {own.task} has no held-out examples: check the folder.")
    files = open_model(
        arguments.model_name_or_path,
        delta_path=arguments.delta,
        adapter=arguments.adapter,
        dtype=arguments.dtype,
        task=task,
    )
    has_head = is_encoder(files.config)
    predictor = objective_of(task.kind, is_encoder=has_head).predictor
    if predictor is None:
        raise ValueError(
            f"The answers of --task {own.task} are written by a causal model and not chosen: use "
            "the evaluator of that task (eval.gsm8k, eval.passk, eval.squad)."
        )
    limit = num_positions(files.config)
    max_length = min(own.max_length, limit) if limit else own.max_length
    questions = predictor.encode(task.test, files.tokenizer, max_length)
    if questions.num_truncated and not has_head:
        raise ValueError(
            f"{questions.num_truncated} of the {len(questions)} examples have candidates that do "
            f"not fit behind the prompt within the max_length of {max_length}, and a part of one "
            "has another likelihood: raise --max_length, or shorten or remove these examples."
        )
    vocab_size = files.config.get_text_config().vocab_size
    refuse_foreign_tokens(questions.largest_token, vocab_size)
    return _Plan(
        files=files,
        task=task,
        predictor=predictor,
        questions=questions,
        max_length=max_length,
        pad_token_id=pad_token_id(files.tokenizer, vocab_size),
    )


def _report(
    arguments: SamplingArguments,
    own: ClassificationArguments,
    plan: _Plan,
    predictions: Sequence[float],
) -> dict[str, Any]:
    """Write the predictions; what results.json holds."""
    folder, files, examples = Path(arguments.output_dir), plan.files, plan.task.test
    (folder / RESULTS_FILE).unlink(missing_ok=True)  # never beside other predictions
    save_predictions(folder, examples, predictions)
    return {
        "task": own.task,
        "n": len(examples),
        "metrics": score(own.task, examples, predictions),
        "protocol": HEAD if is_encoder(files.config) else RANKING,
        **model_facts(files.name, files.config, arguments.delta, arguments.adapter),
        "dtype": files.dtype,
        "max_length": plan.max_length,
        "num_truncated": plan.questions.num_truncated,
        "data_sha256": sha256_of_examples(own.task, examples),
        "versions": versions(),
    }
