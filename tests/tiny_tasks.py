"""Small tasks of each kind without a file, and encoders that learn them (`task_of`)."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertForSequenceClassification,
    BertTokenizer,
    PreTrainedTokenizerFast,
)

from gem_ds.data.dataset import Dataset
from gem_ds.data.tasks import ChoiceExample, Example, Kind, NumberExample, TaskData
from tests.tiny import CONFIGS, DROPOUTS, model_of, tiny_config

WORDS = ["red", "green", "blue", "warm", "cold", "##er", "##ish", "is", "not", "very"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LABELS = ("entailment", "not_entailment")

#: A task of each kind that has metrics.
NAMES: dict[Kind, str] = {"labels": "rte", "choices": "copa", "number": "stsb"}
KINDS = tuple(NAMES)
NUM_PAIRS = 17

#: Whose tokenizers do not tell the first text from the second.
WITHOUT_TYPES = ("modernbert", "roberta")


def make_bert(folder: Path, *, has_pooler: bool = True, dropout: float = 0.0) -> Path:
    auto_class = AutoModel if has_pooler else AutoModelForMaskedLM
    return make_encoder(folder, "bert", auto_class, dropout)


def make_encoder(folder: Path, model_type: str, auto_class: Any, dropout: float = 0.0) -> Path:
    """Write an encoder of two layers with random weights, and its tokenizer."""
    tokenizer = bert_tokenizer()
    if model_type in WITHOUT_TYPES:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    more = dict.fromkeys(DROPOUTS["bert"], dropout) | CONFIGS["published"].get(model_type, {})
    config = tiny_config("encoder", model_type=model_type, vocab_size=len(tokenizer), **more)
    model_of(config, auto_class.from_config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that writes [CLS] first [SEP] second [SEP], told apart; no eos, no bos."""
    bert = BertTokenizer(vocab={token: i for i, token in enumerate([*SPECIAL, *WORDS])})
    return PreTrainedTokenizerFast(  # saved as such it keeps the names of its inputs
        tokenizer_object=bert.backend_tokenizer,
        **bert.special_tokens_map,
        model_input_names=bert.model_input_names,
    )


def make_task(kind: Kind, num_train: int = 21, num_test: int = 5) -> TaskData:
    """Examples of a kind, always the same."""
    rng = random.Random(0)
    make = {"labels": _labelled, "choices": _choice, "number": _number}[kind]
    examples: list[Example] = [make(rng) for _ in range(num_train + num_test)]
    labels = LABELS if kind == "labels" else ()
    return TaskData(examples[:num_train], examples[num_train:], kind, labels)


def choice(
    prompt: str, candidates: tuple[str, ...], answer: int, pairs: Any = (), **more: Any
) -> ChoiceExample:
    """An example whose target is the right one of its candidates."""
    more |= {"candidates": candidates, "answer": answer, "pairs": pairs}
    return ChoiceExample(prompt=prompt, target=candidates[answer], **more)


def make_classifier(dtype: torch.dtype = torch.float32) -> BertForSequenceClassification:
    """A head for three labels; always the same weights, no dropout."""
    model = model_of(tiny_config("classifier"), BertForSequenceClassification)
    return model.to(dtype)  # type: ignore[no-any-return]


def random_pairs() -> Dataset:
    """Random pairs of 3 to 13 tokens with one of three labels."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 14, (NUM_PAIRS,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(offsets[-1])
    return Dataset(
        tokens=torch.randint(1, 30, (total,), generator=generator).int(),
        types=torch.randint(0, 2, (total,), generator=generator).int(),
        offsets=offsets,
        groups=torch.arange(NUM_PAIRS + 1),
        truncated=torch.zeros(NUM_PAIRS, dtype=torch.bool),
        answers=torch.randint(0, 3, (NUM_PAIRS,), generator=generator),
    )


def naive_pair_loss(model: nn.Module, i: int) -> Tensor:
    """Of one example, without batch or padding."""
    data = random_pairs()
    own = slice(int(data.offsets[i]), int(data.offsets[i + 1]))
    tokens, types = (part[None, own].long() for part in (data.tokens, data.types))
    logits = model(input_ids=tokens, token_type_ids=types).logits
    return F.cross_entropy(logits, data.answers[i : i + 1], reduction="sum")


@contextmanager
def task_of(kind: Kind) -> Iterator[None]:
    """Trainings within find these examples, whatever task they name."""
    with mock.patch("gem_ds.train.examples.load_task", return_value=make_task(kind)):
        yield


def put_on_hub(monkeypatch: Any, *address: str, **splits: list[Any]) -> None:
    """The Hub has these splits at this address, and nothing else."""
    monkeypatch.setattr("datasets.load_dataset", lambda *names: {address: splits}[names])


def _text(rng: random.Random) -> str:
    return " ".join(rng.choices([word for word in WORDS if word.isalpha()], k=rng.randint(1, 5)))


def _labelled(rng: random.Random) -> ChoiceExample:
    first, second = _text(rng), _text(rng)
    answer = rng.randrange(2)
    pair = (f"{first}{' very' * answer}", second)
    return choice(f"{first} {'very ' * answer}? {second}:", (" True", " False"), answer, (pair,))


def _choice(rng: random.Random) -> ChoiceExample:
    """Two or three choices of different lengths."""
    premise, answer = _text(rng), rng.randrange(2)
    texts = [_text(rng) for _ in range(rng.randint(2, 3))]
    pairs = tuple((premise, text) for text in texts)
    return choice(f"{premise} so", tuple(f" {text}" for text in texts), answer, pairs)


def _number(rng: random.Random) -> NumberExample:
    value = rng.randint(0, 50) / 10
    pair = (_text(rng), _text(rng))
    return NumberExample(prompt=f"{pair}:", target=f" {value}", pairs=(pair,), value=value)
