"""Losses and predictions of candidates and heads, against a loop over one of them at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from gem_ds.data.dataset import Dataset
from gem_ds.data.encode import encode_candidates
from gem_ds.data.pairs import encode_pairs
from gem_ds.data.tasks import ChoiceExample, TaskData
from gem_ds.distributed.comm import Comm
from gem_ds.models.encoders import head_names, initialise_head, set_head
from gem_ds.models.objective import (
    best_choice,
    mean_log_likelihoods,
    predict_all,
    predict_candidates,
    predict_pairs,
    summed_candidate_loss,
    summed_pair_loss,
)
from tests.tiny_model import make_tiny
from tests.tiny_tasks import KINDS, bert_tokenizer, choice, make_bert, make_task

# Candidates of a causal model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A causal model and its tokenizer."""
    path = make_tiny(tmp_path_factory.mktemp("tiny")).model
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


#: With two or three candidates, of different lengths.
EXAMPLES: list[Any] = make_task("choices").train


def naive_scores(model: Any, tokenizer: Any, example: ChoiceExample) -> Tensor:
    """One candidate alone, token by token."""
    scores = []
    for candidate in example.candidates:
        prompt = tokenizer(example.prompt)["input_ids"]
        ids = tokenizer(f"{example.prompt}{candidate}")["input_ids"]
        log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        answer = range(len(prompt), len(ids))
        scores.append(sum(log_probabilities[t - 1, ids[t]] for t in answer) / len(answer))
    return torch.stack(scores)


def batch_of(examples: list[Any], tokenizer: Any) -> dict[str, Tensor]:
    dataset = encode_candidates(examples, tokenizer, 128)
    return dataset.collate(range(len(dataset)), pad_token_id=0)


def assert_same(model: Any, loss: Tensor, expected: Tensor, absolute: float) -> None:
    """The same loss and the same gradient of every parameter."""
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    found, naive = (
        torch.autograd.grad(each, list(model.parameters())) for each in (loss, expected)
    )
    for gradient, other in zip(found, naive, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=absolute)


def test_scores_loss_and_gradient_are_those_of_each_candidate_alone(tiny):
    """Padding, neighbours or the order of rows would change a likelihood."""
    model, tokenizer = tiny
    batch = batch_of(EXAMPLES, tokenizer)
    scores = [naive_scores(model, tokenizer, e) for e in EXAMPLES]
    found = mean_log_likelihoods(model, batch)
    torch.testing.assert_close(found, torch.cat(scores), rtol=1e-5, atol=1e-6)
    losses = [
        F.cross_entropy(own, torch.tensor(e.answer))
        for own, e in zip(scores, EXAMPLES, strict=True)
    ]
    loss = summed_candidate_loss(model, batch)
    assert_same(model, loss, torch.stack(losses).sum(), absolute=1e-6)
    likeliest = [int(own.argmax()) for own in scores]
    assert predict_candidates(model, batch).tolist() == likeliest
    assert len(set(likeliest)) > 1


def test_ties_go_to_the_first_candidate(tiny):
    model, tokenizer = tiny
    twins = choice("red so", (" blue",) * 3, 2)
    with torch.no_grad():
        assert predict_candidates(model, batch_of([twins], tokenizer)).tolist() == [0]
    scores = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, -torch.inf], [1.0, torch.nan, 2.0]])
    assert best_choice(scores).tolist() == [1, 0, -1]


# An encoder's head


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


def dataset_of(task: TaskData) -> Dataset:
    return encode_pairs(task.train, bert_tokenizer(), 40)


def inputs_of(pairs: Any) -> Any:
    firsts, seconds = zip(*pairs, strict=True)
    return bert_tokenizer()(list(firsts), list(seconds), padding=True, return_tensors="pt")


def naive_head_loss(model: Any, task: TaskData) -> Any:
    """Transformers' own loss, one example at a time."""
    losses = []
    for example in task.train:
        inputs = inputs_of(example.pairs)
        if task.kind == "choices":
            scores = model(**inputs).logits[:, 0]
            losses.append(F.cross_entropy(scores, torch.tensor(example.answer)))
        else:
            answer = example.answer if task.kind == "labels" else example.value
            losses.append(model(**inputs, labels=torch.tensor([answer])).loss)
    return torch.stack(losses).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_the_heads_loss_and_predictions_are_those_of_transformers(folder, kind):
    """Of each example alone: they may not depend on the batch."""
    task = make_task(kind)
    dataset = dataset_of(task)
    batch = dataset.collate(range(len(dataset)), 0)
    model = load(folder, task)
    loss = summed_pair_loss(model, batch)
    assert_same(model, loss, naive_head_loss(model, task), absolute=1e-4)
    model, expected = load(folder, task, seed=6), []
    with torch.no_grad():
        for example in task.train:
            logits = model(**inputs_of(example.pairs)).logits
            scores = logits[:, 0] if kind == "choices" else logits[0]
            expected.append(float(scores[0] if kind == "number" else scores.argmax()))
        found = predict_pairs(model, batch).tolist()
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert len(set(expected)) > 1


def test_no_examples_are_a_batch_without_items(tiny, folder):
    """A rank without rows runs forward and backward too, and must add nothing."""
    model, tokenizer = tiny
    candidates = encode_candidates(EXAMPLES, tokenizer, 128)
    cases = [(model, candidates, summed_candidate_loss, predict_candidates)]
    for task in map(make_task, KINDS):
        cases.append((load(folder, task), dataset_of(task), summed_pair_loss, predict_pairs))
    for model, dataset, loss_of, predict in cases:
        batch = dataset.collate([], pad_token_id=0)
        assert dataset.num_items([]) == 0
        loss = loss_of(model, batch)
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, list(model.parameters())):
            assert gradient.abs().max() == 0
        assert predict(model, batch).tolist() == []


def test_a_head_depends_on_the_seed_and_its_names(folder):
    task = make_task("labels")
    one, same, other = (load(folder, task, seed).classifier for seed in (0, 0, 1))
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)
    assert one.weight.std().item() == pytest.approx(0.5, rel=0.3)
    assert one.bias.detach().abs().max() == 0


def test_rows_of_about_one_length_share_a_batch_and_answers_come_in_order(tiny):
    _, tokenizer = tiny
    texts = ["red so" * length for length in (1, 9, 2, 8, 3)]
    counts = [40, 2, 3, 4, 5]  # of candidates, for whose number no text is longer
    pairs = zip(texts, counts, strict=True)
    examples = [choice(text, (" blue",) * count, 0) for text, count in pairs]
    widths = []

    def count_candidates(_: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        widths.append(batch["input_ids"].shape[1])
        return (batch["candidates"] >= 0).sum(dim=1)

    dataset, comm = encode_candidates(examples, tokenizer, 128), Comm(torch.device("cpu"))
    settings = {"batch_size": 2, "pad_token_id": 0}
    found = predict_all(nn.Identity(), dataset, count_candidates, comm, **settings)
    assert found == counts
    alone = [len(tokenizer(f"{text} blue")["input_ids"]) - 1 for text in texts]
    assert widths == [alone[1], alone[4], alone[0]], "no text is padded to the longest of all"
