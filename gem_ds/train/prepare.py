"""What is decided before any weight is loaded, and everything that can be refused by then.

Each rank prepares for itself, from the same files, and meets the others only afterwards; nothing
here communicates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from gem_ds.data import chat
from gem_ds.data.batches import permutation
from gem_ds.data.dataset import Dataset
from gem_ds.data.encode import LongPromptsError
from gem_ds.data.tasks import (
    AnswerExample,
    ChoiceExample,
    Example,
    NumberExample,
    TaskData,
    load_task,
)
from gem_ds.distributed.zero_config import read_config, zero_stage
from gem_ds.distributed.zero_keys import told_ignored
from gem_ds.files.checkpoint import Checkpoint, RunIdentity
from gem_ds.files.dense_checkpoint import DenseCheckpoint
from gem_ds.files.mask import Mask
from gem_ds.models.encoders import is_encoder, num_positions, set_head
from gem_ds.models.load import trainable_config
from gem_ds.models.objective import Encode, Objective, objective_of
from gem_ds.models.tokenizer import load_tokenizer, pad_token_id, refuse_foreign_tokens
from gem_ds.models.weight_files import refuse_damaged_files
from gem_ds.sparse.sddmm import check_kernel
from gem_ds.train.best import refuse_unmeasured
from gem_ds.train.config import Arguments, DataArguments, TrainArguments
from gem_ds.train.deepspeed import resolve_deepspeed
from gem_ds.train.optimizer import adam_of_bitsandbytes
from gem_ds.train.reporting import find_trackers
from gem_ds.train.resume import dense_settings, entries_of, identity_of, load_checkpoint
from gem_ds.train.targets import Targets, settle_targets

_SPLIT_SEED = 0  # of which examples are the development set; no flag changes it


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run reads, encoded."""

    train: Dataset
    test: Dataset  # held-out examples, for the loss; may be empty
    questions: Dataset | None  # what predictions are made from; None where answers are generated
    references: list[Example]  # the examples of ``questions``, else of ``test``, as text
    notes: tuple[str, ...]  # how the data were read, and what was left out

    def fingerprint(self) -> str:
        """A hash of what a run is measured on."""
        return self.test.fingerprint() + (self.questions.fingerprint() if self.questions else "")


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that nothing stands against any more: all that it needs but weights."""

    args: Arguments
    output_dir: Path  # exists or will
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int
    task: TaskData  # the examples as text
    data: RunData  # the same as the model reads them
    objective: Objective
    targets: Targets
    deepspeed: dict[str, Any]  # resolved
    mask: Mask | None  # the entries, where they are not to be calibrated
    checkpoint: Checkpoint | DenseCheckpoint | None  # what to go on from
    identity: RunIdentity  # the checkpoint's; what a later resume must agree with
    notes: list[str]  # how what the user gave was read, a line each

    def dense_settings(self, world_size: int) -> dict[str, str | int | float]:
        """What a checkpoint of whole parameters can only be resumed with."""
        return dense_settings(self.args, self.targets, zero_stage(self.deepspeed), world_size)

    def digest(self) -> str:
        """A fingerprint of what all ranks must agree on before they meet in a collective."""
        parts = (
            self.identity,
            self.data.fingerprint(),
            self.targets,
            self.deepspeed,
            None if self.mask is None else entries_of(self.mask),
            None if self.checkpoint is None else self.checkpoint.digest(),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def prepare(args: Arguments, world_size: int) -> PreparedRun:
    """Decide and check everything that needs no weights; a ValueError says what to change."""
    output_dir = Path(str(args.train.output_dir))
    _refuse_unavailable(args)
    checkpoint = load_checkpoint(args, output_dir)
    mask = checkpoint.mask if isinstance(checkpoint, Checkpoint) else None
    if mask is None and args.method.mask:
        mask = Mask.load(args.method.mask)
    name, trust_remote_code = str(args.model.model_name_or_path), args.model.trust_remote_code
    config = trainable_config(name, args.model.revision, trust_remote_code=trust_remote_code)
    refuse_damaged_files(name)
    task = load_examples(args.data)
    set_head(config, name, task)
    objective = objective_of(
        task.kind, is_encoder=is_encoder(config), classification_loss=args.data.classification_loss
    )
    if args.data.long_prompts == "truncate_left" and is_encoder(config):
        raise ValueError(
            "--long_prompts is for prompts of causal models, and the pairs that an encoder reads "
            "are cut at the end of the longer text: leave it out."
        )
    if args.method.calibration_head_steps and not is_encoder(config):
        raise ValueError(
            f"--calibration_head_steps trains an encoder's head, and {config.model_type} has none: "
            "leave it out."
        )
    targets = settle_targets(args, config, mask)
    written = read_config(args.train.deepspeed) if args.train.deepspeed else {}
    deepspeed = resolve_deepspeed(written, args.train, config, targets, world_size)
    if isinstance(checkpoint, DenseCheckpoint):
        stage = zero_stage(deepspeed)
        checkpoint.refuse_other(dense_settings(args, targets, stage, world_size))
    if args.method.method == "shira" and zero_stage(deepspeed) == 3:
        raise ValueError(
            "--method shira adds to whole weights, and ZeRO stage 3 cuts them: use "
            "ds_configs/zero2.json."
        )
    tokenizer = load_tokenizer(name, args.model.revision, trust_remote_code=trust_remote_code)
    data = encode_examples(args.data, task, objective, tokenizer, config)
    refuse_unmeasured(args.train, str(args.data.task), objective, len(data.test))
    return PreparedRun(
        args=args,
        output_dir=output_dir,
        config=config,
        tokenizer=tokenizer,
        pad_token_id=pad_token_id(tokenizer, config.get_text_config().vocab_size),
        task=task,
        data=data,
        objective=objective,
        targets=targets,
        deepspeed=deepspeed,
        mask=mask,
        checkpoint=checkpoint,
        identity=identity_of(args, fingerprint(args.data, data.train), checkpoint, world_size),
        notes=[*args.notes, *_notes(args.train, written)],
    )


def _notes(train: TrainArguments, deepspeed: dict[str, Any]) -> Iterator[str]:
    """How flags and the DeepSpeed JSON were read where they say more than is done."""
    if train.tf32 and not torch.cuda.is_available():
        yield "--tf32 has no effect without a GPU"
    if passed_over := told_ignored(deepspeed):
        yield passed_over


def _refuse_unavailable(args: Arguments) -> None:
    """Refuse flags that need what this machine has not."""
    find_trackers(args.train.report_to)
    if args.train.optimizer == "adamw_8bit":
        adam_of_bitsandbytes()
    if args.train.fp16 and not torch.cuda.is_available():
        raise ValueError("--fp16 needs a GPU: pass --bf16, or neither for fp32.")
    check_kernel(args.method.sddmm_kernel, "cuda" if torch.cuda.is_available() else "cpu")


def load_examples(data: DataArguments) -> TaskData:
    """The examples that the flags name; ``test`` is what the run is measured on."""
    task = load_task(
        str(data.task),
        data_dir=data.data_dir,
        train_file=data.train_file,
        test_file=data.test_file,
        dataset_name=data.dataset_name,
        dataset_config_name=data.dataset_config_name,
        prompt_field=data.prompt_field,
        target_field=data.target_field,
        train_on=data.train_on,
    )
    if data.evaluate_on == "test" and not task.test:
        raise ValueError(
            f"--evaluate_on test: {data.data_dir or data.train_file or data.dataset_name} holds no "
            f"held-out examples of --task {data.task}: add its validation file, or pass "
            "--evaluate_on dev."
        )
    order, num_left = _split(task, data.dev_examples)
    if data.dev_examples and num_left < 1:
        raise ValueError(
            f"--dev_examples {data.dev_examples} leaves none of the {len(task.train)} training "
            "examples to train on: lower it."
        )
    train = sorted(order[:num_left][: data.train_examples])
    dev = sorted(order[num_left:])
    test = [task.train[i] for i in dev] if data.evaluate_on == "dev" else task.test
    return replace(task, train=[task.train[i] for i in train], test=test[: data.max_eval_samples])


def _split(task: TaskData, num_dev: int) -> tuple[list[int], int]:
    """A fixed random order of the examples, and how many of them are not of the development set.

    Examples on the same passage stay together, so that none is half learnt; the development set may
    thereby be a little larger than asked for.
    """
    examples = task.train
    passages = _passages(examples) if task.has_passages else range(len(examples))
    texts: dict[str | int, list[int]] = {}
    for i in permutation(len(examples), _SPLIT_SEED, epoch=0).tolist():
        texts.setdefault(passages[i], []).append(i)
    order: list[int] = []
    num_left = len(examples)
    for group in reversed(texts.values()):
        if len(order) < num_dev:
            num_left -= len(group)
        order += reversed(group)
    return order[::-1], num_left


def _passages(examples: Sequence[Example]) -> list[str]:
    """What each example is about: of a pair of texts that which is the longer one on the whole."""
    pairs = [e.pairs[0] for e in examples if isinstance(e, ChoiceExample | NumberExample)]
    if pairs:
        firsts, seconds = ([text or "" for text in texts] for texts in zip(*pairs, strict=True))
        longer = firsts if sum(map(len, firsts)) >= sum(map(len, seconds)) else seconds
        return [text.replace("*", "") for text in longer]  # by which wsc marks words of a text
    return [e.passage for e in examples if isinstance(e, AnswerExample)]


def encode_examples(
    data: DataArguments,
    task: TaskData,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
) -> RunData:
    """The examples as datasets; a ValueError if one cannot be, or the model cannot read it."""
    encode, notes = objective.encode, list(task.notes)
    train_examples, train = _encode(data, task.train, encode, tokenizer, "training", notes)
    if not len(train):
        raise ValueError(
            f"--long_prompts drop leaves none of the {len(task.train):,} training examples: raise "
            "--max_length, or pass --long_prompts truncate_left."
        )
    references, test = _encode(data, task.test, encode, tokenizer, "held-out", notes)
    if data.packing and train.answers is not None:
        raise ValueError(
            "--packing is for examples whose answers are written, one sequence each: leave it out."
        )
    predictor, questions = objective.predictor, None
    if predictor is not None and predictor.encode == encode:
        questions = test
    elif predictor is not None:
        references, questions = _encode(
            data, task.test, predictor.encode, tokenizer, "held-out", notes
        )
    datasets = [train, test, *([] if questions is None else [questions])]
    vocab_size = config.get_text_config().vocab_size
    refuse_foreign_tokens(max(dataset.largest_token for dataset in datasets), vocab_size)
    longest, limit = max(dataset.longest for dataset in datasets), num_positions(config)
    if limit and longest > limit:
        raise ValueError(
            f"The longest example has {longest} tokens and the model reads {limit}: pass "
            f"--max_length {limit} or less."
        )
    notes += chat.notes(train_examples, tokenizer)
    return RunData(
        train=train,
        test=test,
        questions=questions,
        references=references,
        notes=tuple(dict.fromkeys(notes)),
    )


def _encode(
    data: DataArguments,
    examples: list[Example],
    encode: Encode,
    tokenizer: PreTrainedTokenizerBase,
    part: str,
    notes: list[str],
) -> tuple[list[Example], Dataset]:
    """A part of the examples without those that ``--long_prompts`` drops, which is noted."""
    options = {"truncate_left": True} if data.long_prompts == "truncate_left" else {}
    try:
        return examples, encode(examples, tokenizer, data.max_length, **options)
    except LongPromptsError as error:
        if data.long_prompts != "drop":
            raise
        notes.append(
            f"{len(error.rows):,} of {len(examples):,} {part} examples are left out, as their "
            f"prompts leave no room for an answer within --max_length {data.max_length} (the "
            f"longest has {error.longest:,} tokens): --long_prompts truncate_left would keep them"
        )
        long = set(error.rows)
        kept = [example for i, example in enumerate(examples) if i not in long]
        return kept, encode(kept, tokenizer, data.max_length, **options)


def fingerprint(data: DataArguments, train: Dataset) -> str:
    """What tells the rows of a training set, and the order they come in, from others."""
    packed = f"packed into {data.max_length}" if data.packing else "one by one"
    told = f"{train.fingerprint()} {packed} {data.train_sampling_strategy}"
    return hashlib.sha256(told.encode()).hexdigest()
