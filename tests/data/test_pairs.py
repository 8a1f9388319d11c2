"""Sentence pairs and the losses of a head, against the tokenizer and the losses of transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification

from gem_ds.data.pairs import PairDataset, predict_pairs, summed_pair_loss
from gem_ds.data.tasks import Kind, TaskData
from gem_ds.models.encoders import head_names, initialise_head, set_head
from tests.tiny_tasks import LABELS, bert_tokenizer, make_bert, make_task

WIDE = 40
KINDS: tuple[Kind, ...] = ("labels", "choices", "number")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert"))


def load(folder: Path, task: TaskData, seed: int = 0) -> Any:
    """The model with the head of a task."""
    config = AutoConfig.from_pretrained(folder)
    set_head(config, "bert", task)
    model = AutoModelForSequenceClassification.from_pretrained(folder, config=config).eval()
    initialise_head(model, head_names(model), 0.5, seed)
    return model


def dataset_of(task: TaskData, max_length: int = WIDE) -> PairDataset:
    return PairDataset.encode(task.train, bert_tokenizer(), max_length)


def inputs_of(pairs: Any) -> Any:
    firsts, seconds = zip(*pairs, strict=True)
    return bert_tokenizer()(list(firsts), list(seconds), padding=True, return_tensors="pt")


def naive_loss(model: Any, task: TaskData) -> Any:
    """Transformers' own loss, one example at a time."""
    losses = []
    for example in task.train:
        assert hasattr(example, "pairs")
        inputs = inputs_of(example.pairs)
        if task.kind == "choices":
            scores = model(**inputs).logits[:, 0]
            losses.append(F.cross_entropy(scores, torch.tensor(example.answer)))
        else:
            answer = example.answer if task.kind == "labels" else example.value
            losses.append(model(**inputs, labels=torch.tensor([answer])).loss)
    return torch.stack(losses).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_encoded_as_the_tokenizer_does(kind):
    task, tokenizer = make_task(kind), bert_tokenizer()
    dataset = dataset_of(task)
    pairs = [pair for example in task.train for pair in example.pairs]
    rows = [tokenizer(*pair) for pair in pairs]
    assert dataset.types is not None
    for i, row in enumerate(rows):
        entries = slice(dataset.offsets[i], dataset.offsets[i + 1])
        assert dataset.tokens[entries].tolist() == row["input_ids"]
        assert dataset.types[entries].tolist() == row["token_type_ids"]
    assert dataset.weight(range(len(dataset))) == len(task.train) == len(dataset)
    assert dataset.num_truncated == 0
    assert dataset.lengths.sum() == len(dataset.tokens)
    indices = [2, 0, 2]
    same = dataset_of(replace(task, train=[task.train[i] for i in indices]))
    assert dataset.select(indices).fingerprint() == same.fingerprint() != dataset.fingerprint()


def test_the_longer_text_is_cut(folder):
    task = make_task("labels")
    long = replace(task.train[0], pairs=(("red " * 10, "blue"),))
    short = replace(task.train[0], pairs=(("red", "blue"),))
    dataset = dataset_of(TaskData([long, short], [], "labels", LABELS), max_length=8)
    expected = bert_tokenizer()("red " * 4, "blue")["input_ids"]
    assert dataset.tokens[: dataset.offsets[1]].tolist() == expected
    assert (dataset.num_truncated, dataset.longest) == (1, 8)
    with pytest.raises(ValueError, match=r"3 special tokens .* raise --max_length"):
        dataset_of(TaskData([long], [], "labels", LABELS), max_length=3)


def test_single_sentences_and_tokenizers_without_types():
    task = make_task("labels")
    single = replace(task.train[0], pairs=(("red blue", None),))
    tokenizer = bert_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    dataset = PairDataset.encode([single], tokenizer, WIDE)
    assert dataset.tokens.tolist() == tokenizer("red blue")["input_ids"]
    assert "token_type_ids" not in dataset.collate([0], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradient_are_those_of_transformers(folder, kind):
    task = make_task(kind)
    model = load(folder, task)
    dataset = dataset_of(task)
    loss = summed_pair_loss(model, dataset.collate(range(len(dataset)), 0))
    expected = naive_loss(model, task)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters)
    for gradient, naive in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradient, naive, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_do_not_depend_on_the_batch(folder, kind):
    task = make_task(kind)
    model, dataset = load(folder, task, seed=6), dataset_of(task)
    with torch.no_grad():
        expected = []
        for example in task.train:
            logits = model(**inputs_of(example.pairs)).logits
            scores = logits[:, 0] if kind == "choices" else logits[0]
            expected.append(float(scores[0] if kind == "number" else scores.argmax()))
        found = predict_pairs(model, dataset.collate(range(len(dataset)), 0)).tolist()
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert len(set(expected)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_no_examples_are_a_batch_of_weight_zero(folder, kind):
    task = make_task(kind)
    model, dataset = load(folder, task), dataset_of(task)
    batch = dataset.collate([], 0)
    loss = summed_pair_loss(model, batch)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, list(model.parameters())):
        assert gradient.abs().max() == 0
    assert predict_pairs(model, batch).tolist() == []
    assert len(PairDataset.encode([], bert_tokenizer(), WIDE)) == 0


def test_a_head_depends_on_the_seed_and_its_names(folder):
    task = make_task("labels")
    one, same, other = (load(folder, task, seed).classifier for seed in (0, 0, 1))
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)
    assert one.weight.std().item() == pytest.approx(0.5, rel=0.3)
    assert one.bias.detach().abs().max() == 0
