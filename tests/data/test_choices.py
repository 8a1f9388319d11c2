"""Candidates and their likelihoods, against a loop over one candidate at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem_ds.data.choices import (
    ChoiceDataset,
    best_choice,
    mean_log_likelihoods,
    predict_candidates,
    rows_of_groups,
    summed_candidate_loss,
)
from gem_ds.data.tasks import ChoiceExample
from tests.tiny_model import make_tiny
from tests.tiny_tasks import make_task

WIDE = 128


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A causal model and its tokenizer."""
    folder = make_tiny(tmp_path_factory.mktemp("tiny")).model
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def examples() -> list[Any]:
    """With two or three candidates, of different lengths."""
    return make_task("choices").train


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


def naive_loss(model: Any, tokenizer: Any, examples: list[Any]) -> Tensor:
    losses = [
        F.cross_entropy(naive_scores(model, tokenizer, e), torch.tensor(e.answer)) for e in examples
    ]
    return torch.stack(losses).sum()


def batch_of(examples: list[Any], tokenizer: Any) -> dict[str, Tensor]:
    dataset = ChoiceDataset.encode(examples, tokenizer, WIDE)
    return dataset.collate(range(len(dataset)), pad_token_id=0)


def test_candidates_are_encoded_without_eos(tiny, examples):
    """A candidate's likelihood would count the end of the text, which is no part of it."""
    _, tokenizer = tiny
    dataset = ChoiceDataset.encode(examples, tokenizer, WIDE)
    texts = [f"{e.prompt}{candidate}" for e in examples for candidate in e.candidates]
    found = [dataset.sequences.input_ids(i).tolist() for i in range(len(texts))]
    assert found == [tokenizer(text)["input_ids"] for text in texts]
    assert dataset.offsets.diff().tolist() == [len(e.candidates) for e in examples]
    assert {len(e.candidates) for e in examples} == {2, 3}
    assert dataset.answers.tolist() == [e.answer for e in examples]
    assert len(dataset) == len(examples) == dataset.weight(range(len(dataset)))
    assert dataset.lengths[[0, 2]].sum() == sum(
        len(tokenizer(f"{examples[i].prompt}{candidate}")["input_ids"])
        for i in (0, 2)
        for candidate in examples[i].candidates
    )


def test_scores_are_those_of_each_candidate_alone(tiny, examples):
    """Padding, neighbours or the order of rows would change a likelihood."""
    model, tokenizer = tiny
    with torch.no_grad():
        found = mean_log_likelihoods(model, batch_of(examples, tokenizer))
        expected = torch.cat([naive_scores(model, tokenizer, e) for e in examples])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_loss_and_its_gradient_are_those_of_naive_code(tiny, examples):
    model, tokenizer = tiny
    parameters = list(model.parameters())
    loss = summed_candidate_loss(model, batch_of(examples, tokenizer))
    expected = naive_loss(model, tokenizer, examples)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    found = torch.autograd.grad(loss, parameters)
    for gradient, naive in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradient, naive, rtol=1e-4, atol=1e-6)


def test_the_likeliest_candidate_is_predicted_however_batches_are_cut(tiny, examples):
    model, tokenizer = tiny
    with torch.no_grad():
        expected = [int(naive_scores(model, tokenizer, e).argmax()) for e in examples]
    assert len(set(expected)) > 1
    dataset = ChoiceDataset.encode(examples, tokenizer, WIDE)
    for size in (1, 4, len(examples)):
        found: list[int] = []
        for first in range(0, len(dataset), size):
            rows = range(first, min(first + size, len(dataset)))
            with torch.no_grad():
                found += predict_candidates(model, dataset.collate(rows, 0)).tolist()
        assert found == expected


def test_ties_go_to_the_first_candidate(tiny):
    model, tokenizer = tiny
    twins = ChoiceExample(
        prompt="red so",
        target=" blue",
        candidates=(" blue", " blue", " blue"),
        answer=2,
        pairs=(),
    )
    with torch.no_grad():
        assert predict_candidates(model, batch_of([twins], tokenizer)).tolist() == [0]
    scores = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, -torch.inf], [1.0, torch.nan, 2.0]])
    assert best_choice(scores).tolist() == [1, 0, -1]


def test_no_examples_are_a_batch_of_weight_zero(tiny, examples):
    """A rank without rows runs forward and backward too, and must add nothing."""
    model, tokenizer = tiny
    dataset = ChoiceDataset.encode(examples, tokenizer, WIDE)
    batch = dataset.collate([], pad_token_id=0)
    assert dataset.weight([]) == 0
    loss = summed_candidate_loss(model, batch)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, list(model.parameters())):
        assert gradient.abs().max() == 0
    assert predict_candidates(model, batch).tolist() == []
    assert len(ChoiceDataset.encode([], tokenizer, WIDE)) == 0


def test_rows_of_groups_by_hand():
    assert rows_of_groups(torch.tensor([2, 3, 1])).tolist() == [[0, 1, -1], [2, 3, 4], [5, -1, -1]]
    assert rows_of_groups(torch.tensor([], dtype=torch.int64)).shape == (0, 1)


def test_a_selection_is_its_examples_encoded_alone(tiny, examples):
    _, tokenizer = tiny
    dataset = ChoiceDataset.encode(examples, tokenizer, WIDE)
    indices = [3, 0, 3]
    same = ChoiceDataset.encode([examples[i] for i in indices], tokenizer, WIDE)
    assert dataset.select(indices).fingerprint() == same.fingerprint()
    other = replace(examples[0], answer=1 - examples[0].answer)
    assert (
        ChoiceDataset.encode([other], tokenizer, WIDE).fingerprint()
        != ChoiceDataset.encode([examples[0]], tokenizer, WIDE).fingerprint()
    )


def test_what_is_too_long_is_counted_by_example_and_named(tiny):
    _, tokenizer = tiny
    short = ChoiceExample(
        prompt="ab", target="c", candidates=("c", "d"), answer=0, pairs=(("ab", None),)
    )
    long = replace(short, candidates=("cdef", "ghij"))
    assert ChoiceDataset.encode([short, long, long], tokenizer, 4).num_truncated == 2
    with pytest.raises(ValueError, match=r"Example 3 has a prompt of 9 tokens"):
        ChoiceDataset.encode([short, long, replace(short, prompt="a" * 9)], tokenizer, 4)
    with pytest.raises(ValueError, match="Example 2 has the candidate '', which"):
        ChoiceDataset.encode([short, replace(short, candidates=("c", ""))], tokenizer, 4)
