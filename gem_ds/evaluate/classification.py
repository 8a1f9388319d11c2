"""Metrics of tasks whose answers are chosen: labels, choices, and the numbers of encoders.

    python -m eval.classification --task rte --model_name_or_path M [--delta F] [--adapter DIR]
                                  [--data_dir D] --output_dir O [--limit N] [--max_length 1024]

A causal model predicts the candidate whose tokens have the highest mean log-likelihood after the
prompt (`gem_ds.models.objective`), an encoder what its classification head says.

predictions.jsonl tells what was predicted for each example (`gem_ds.data.predictions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import transformers

from gem_ds.data.dataset import Dataset
from gem_ds.data.metrics import score
from gem_ds.data.predictions import PREDICTIONS_FILE, judged
from gem_ds.data.tasks import TaskData, load_task
from gem_ds.evaluate.evaluator import Report, evaluate, held_out, metrics_report
from gem_ds.evaluate.generation import sparing_memory
from gem_ds.evaluate.model import (
    SamplingArguments,
    joined_ranks,
    load_model,
    model_facts,
    open_files,
)
from gem_ds.flags import option, refuse_below_one
from gem_ds.models.encoders import is_encoder, num_positions
from gem_ds.models.load import ModelFiles
from gem_ds.models.objective import Predictor, objective_of, predict_all
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


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate a model, as `gem_ds.evaluate.evaluator.evaluate`."""
    about = "Metrics of a language model on a classification task."
    return evaluate("eval classification", about, [ClassificationArguments], _judge, argv)


def _judge(arguments: SamplingArguments, own: ClassificationArguments) -> Report | None:
    _check(arguments, own)
    transformers.utils.logging.set_verbosity_error()  # it would report that a new head is new
    with joined_ranks(arguments) as comm:
        with comm.agreement():  # what can be refused is refused before any weight is loaded
            task = load_task(own.task, data_dir=arguments.data_dir)
            examples = list(held_out(own.task, task.test, arguments.limit))
            task = replace(task, train=[], test=examples)
            files, deepspeed = open_files(arguments, task)
            limit = num_positions(files.config)
            max_length = min(own.max_length, limit) if limit else own.max_length
            vocab_size = files.config.get_text_config().vocab_size
            predictor, questions = _questions(own.task, task, files, max_length, vocab_size)
        model = load_model(files, deepspeed, comm)
        with sparing_memory(f"{arguments.batch_size} examples and all their candidates"):
            predictions = predict_all(
                model,
                questions,
                predictor.predict,
                comm,
                batch_size=arguments.batch_size,
                pad_token_id=pad_token_id(files.tokenizer, vocab_size),
            )
    if not comm.is_main:
        return None
    return metrics_report(
        own.task,
        examples,
        score(own.task, examples, predictions),
        protocol=HEAD if is_encoder(files.config) else RANKING,
        subject={
            **model_facts(arguments, files),
            "dtype": files.dtype,
            "max_length": max_length,
            "num_truncated": questions.num_truncated,
        },
        verdicts=judged(examples, predictions),
        verdicts_file=PREDICTIONS_FILE,
    )


def _check(arguments: SamplingArguments, own: ClassificationArguments) -> None:
    if arguments.backend != "transformers":
        raise ValueError("--backend vllm is for what is generated: leave it out.")
    refuse_below_one(max_length=own.max_length)
    there = Path(arguments.output_dir, PREDICTIONS_FILE)
    if there.exists() and not arguments.overwrite_output_dir:
        raise ValueError(
            f"{there} is there already: pass --overwrite_output_dir to replace it, or another "
            "--output_dir."
        )


def _questions(
    name: str, task: TaskData, files: ModelFiles, max_length: int, vocab_size: int
) -> tuple[Predictor, Dataset]:
    """How the answers of a task are chosen, and its examples in tokens."""
    has_head = is_encoder(files.config)
    predictor = objective_of(task.kind, is_encoder=has_head).predictor
    if predictor is None:
        raise ValueError(
            f"The answers of --task {name} are written by a causal model and not chosen: use "
            "the evaluator of that task (eval.gsm8k, eval.passk, eval.squad)."
        )
    questions = predictor.encode(task.test, files.tokenizer, max_length)
    if questions.num_truncated and not has_head:
        raise ValueError(
            f"{questions.num_truncated} of the {len(questions)} examples have candidates that do "
            f"not fit behind the prompt within the max_length of {max_length}, and a part of one "
            "has another likelihood: raise --max_length, or shorten or remove these examples."
        )
    refuse_foreign_tokens(questions.largest_token, vocab_size)
    return predictor, questions
