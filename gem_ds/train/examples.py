"""A run's examples: which are trained on and which are held out, read and encoded."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

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
    Source,
    TaskData,
    load_task,
)
from gem_ds.models.encoders import num_positions
from gem_ds.models.objective import Encode, Objective
from gem_ds.models.tokenizer import refuse_foreign_tokens
from gem_ds.train.config import DataArguments

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


def load_examples(data: DataArguments) -> TaskData:
    """The examples that the flags name; ``test`` is what the run is measured on."""
    said = {field.name: getattr(data, field.name) for field in fields(Source)}
    task = load_task(str(data.task), **said)
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
