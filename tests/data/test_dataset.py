"""Batches of a dataset by hand, and packed rows that keep their examples apart."""

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from gem_ds.data.dataset import Dataset, offsets_of, rows_of_groups
from gem_ds.data.packing import pack, pack_rows


def make_dataset(tokens, shape):
    """A row of (prompt length, answer length) each."""
    return Dataset(
        tokens=tokens.int(),
        offsets=offsets_of([prompt + answer for prompt, answer in shape]),
        groups=torch.arange(len(shape) + 1),
        prompt_lengths=torch.tensor([prompt for prompt, _ in shape], dtype=torch.int32),
        truncated=torch.zeros(len(shape), dtype=torch.bool),
    )


THREE = make_dataset(torch.tensor([11, 12, 13, 21, 22, 23, 24, 31, 32]), [(1, 2), (3, 1), (1, 1)])
#: Two candidates of one example and one of another; the same with types and without labels.
CHOICES = replace(THREE, groups=torch.tensor([0, 2, 3]), answers=torch.tensor([1, 0]))
PAIRS = replace(CHOICES, prompt_lengths=None, types=torch.arange(9).int() % 2)


def lists_of(batch):
    assert all(value.dtype == torch.int64 for value in batch.values())
    return {key: value.tolist() for key, value in batch.items()}


def test_fingerprints_stand_in_checkpoints():
    """One that changes with the code would refuse to resume every run of before."""
    found = [d.fingerprint() for d in (THREE, CHOICES, PAIRS, replace(PAIRS, types=None))]
    assert found[1].startswith(found[0])
    assert [text[-8:] for text in found] == ["3bba6804", "e7723369", "54c27a05", "b7909bef"]
    others = [  # every part is seen
        replace(THREE, tokens=THREE.tokens + 1),
        replace(THREE, offsets=torch.tensor([0, 4, 7, 9])),
        replace(THREE, prompt_lengths=THREE.prompt_lengths + 1),
        pack(THREE, 10),
    ]
    assert len({d.fingerprint() for d in [THREE, *others]}) == 5


def test_texts_by_hand():
    assert lists_of(THREE.collate([1, 2], pad_token_id=9)) == {
        "input_ids": [[21, 22, 23, 24], [31, 32, 9, 9]],
        "labels": [[-100, -100, -100, 24], [-100, 32, -100, -100]],
        "answer_positions": [2, 4],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
    }


def test_packed_rows_by_hand():
    packed = replace(THREE, groups=torch.tensor([0, 2, 3]), is_packed=True)
    assert lists_of(packed.collate([0, 1], pad_token_id=9)) == {
        "input_ids": [[11, 12, 13, 21, 22, 23, 24], [31, 32, 9, 9, 9, 9, 9]],
        "labels": [[-100, 12, 13, -100, -100, -100, 24], [-100, 32, -100, -100, -100, -100, -100]],
        "answer_positions": [0, 1, 5, 7],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4]],
    }
    assert packed.lengths.tolist() == [7, 2]
    assert (packed.longest, packed.num_items([0]), len(packed)) == (7, 3, 2)


def test_candidates_and_pairs_by_hand():
    rows = {"candidates": [[0, -1], [1, 2]], "answers": [0, 1]}
    assert lists_of(CHOICES.collate([1, 0], pad_token_id=9)) == {
        "input_ids": [[31, 9, 9], [11, 12, 9], [21, 22, 23]],  # the last token need not be read
        "attention_mask": [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
        "answer_tokens": [32, 12, 13, 24],
        "answer_positions": [0, 3, 4, 8],
        "answer_rows": [0, 1, 2, 3],
        "candidate_tokens": [[0, -1], [1, 2], [3, -1]],
        **rows,
    }
    texts = {
        "input_ids": [[31, 32, 9, 9], [11, 12, 13, 9], [21, 22, 23, 24]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
    }
    types = {"token_type_ids": [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0]]}
    assert lists_of(PAIRS.collate([1, 0], pad_token_id=9)) == {**texts, **types, **rows}
    for dataset in (CHOICES, PAIRS):
        assert dataset.lengths.tolist() == [7, 2]
        assert (dataset.longest, dataset.num_items([0]), len(dataset)) == (4, 1, 2)
    assert rows_of_groups(torch.tensor([2, 3, 1])).tolist() == [[0, 1, -1], [2, 3, 4], [5, -1, -1]]
    assert rows_of_groups(torch.tensor([], dtype=torch.int64)).shape == (0, 1)


def candidates_of(examples):
    """A dataset of examples that are each a prompt and its candidates, in tokens."""
    sequences = [prompt + candidate for prompt, own in examples for candidate in own]
    shape = [(len(prompt), len(candidate)) for prompt, own in examples for candidate in own]
    return replace(
        make_dataset(torch.tensor([token for ids in sequences for token in ids]), shape),
        groups=offsets_of([len(own) for _, own in examples]),
        answers=torch.zeros(len(examples), dtype=torch.int64),
    )


def test_candidates_share_what_they_begin_with():
    """Those of one token one sequence, and a longer one what a shorter one is read from."""
    examples = [([1, 2], [[3], [4], [5]]), ([1, 2], [[6], [7, 6], [7, 8, 9], [8, 6]])]
    assert lists_of(candidates_of(examples).collate([0, 1], pad_token_id=0)) == {
        "input_ids": [[1, 2, 0, 0], [1, 2, 7, 8], [1, 2, 8, 0]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]],
        "answer_tokens": [3, 4, 5, 6, 7, 6, 7, 8, 9, 8, 6],
        "answer_positions": [1, 5, 6, 7, 9, 10],
        "answer_rows": [0, 0, 0, 1, 1, 2, 1, 2, 3, 4, 5],
        "candidate_tokens": [[i, -1, -1] for i in range(4)] + [[4, 5, -1], [6, 7, 8], [9, 10, -1]],
        "candidates": [[0, 1, 2, -1], [3, 4, 5, 6]],
        "answers": [0, 0],
    }


TOKENS = st.lists(st.integers(1, 2), min_size=1, max_size=4)
EXAMPLES = st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=5)), max_size=4)


@settings(max_examples=200, deadline=None)
@given(EXAMPLES)
def test_each_token_of_a_candidate_is_predicted_after_all_that_precedes_it(examples):
    batch = lists_of(candidates_of(examples).collate(range(len(examples)), pad_token_id=0))
    width, read = len(batch["input_ids"][0]), set()
    for (prompt, own), rows in zip(examples, batch["candidates"], strict=True):
        readers = []
        for candidate, i in zip(own, rows, strict=False):
            places = [place for place in batch["candidate_tokens"][i] if place >= 0]
            assert [batch["answer_tokens"][place] for place in places] == candidate
            for number, place in enumerate(places):
                position = batch["answer_positions"][batch["answer_rows"][place]]
                row, column = divmod(position, width)
                before = batch["input_ids"][row][: column + 1]
                assert before == (prompt + candidate)[: len(prompt) + number]
                assert all(batch["attention_mask"][row][: column + 1])
                readers.append(row)
        assert not read & set(readers), "of other examples"
        read |= set(readers)
        texts = [
            [token for token in batch["input_ids"][row] if token] for row in sorted(set(readers))
        ]
        assert not any(b[: len(a)] == a for a in texts for b in texts if a is not b), "read twice"
    assert len(read) == len(batch["input_ids"]) * bool(examples), "none is read for nothing"


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def llama(request):
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, **heads, attn_implementation=request.param)
    return LlamaForCausalLM(config).eval()


def summed_loss(model, batch):
    """The sum of answer-token losses, from the model's logits and the batch's labels."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    labels = batch["labels"][:, 1:].flatten()
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum").item()


def loss_alone(model, dataset, i):
    """The same for one example alone: no padding, no mask, no labels, position by position."""
    ids = dataset.tokens[dataset.offsets[i] : dataset.offsets[i + 1]].long()
    with torch.no_grad():
        log_probabilities = log_softmax(model(ids[None], use_cache=False).logits[0], -1)
    answer = range(int(dataset.prompt_lengths[i]), len(ids))
    return -sum(log_probabilities[t - 1, ids[t]].item() for t in answer)


SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12)


@settings(max_examples=12, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 99), room=st.integers(12, 40))
def test_packed_and_padded_rows_lose_what_their_examples_lose_alone(llama, shapes, seed, room):
    """An example that sees its neighbour in a packed row would have another loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 50, (sum(map(sum, shapes)),), generator=generator)
    dataset = make_dataset(tokens, shapes)
    alone = sum(loss_alone(llama, dataset, i) for i in range(len(dataset)))
    for rows in (pack(dataset, room), dataset):
        batch = rows.collate(range(len(rows)), pad_token_id=0)
        assert summed_loss(llama, batch) == pytest.approx(alone, rel=1e-5)
        assert rows.num_items(range(len(rows))) == sum(answer for _, answer in shapes)


@pytest.mark.parametrize("packed", [False, True])
def test_no_rows_are_a_batch_without_items_with_finite_logits(llama, packed):
    """A rank that has no rows left still runs the model, and a NaN would reach the others."""
    dataset = pack(THREE, 9) if packed else THREE
    batch = dataset.collate([], pad_token_id=7)
    assert dataset.num_items([]) == 0
    assert lists_of(batch) == {
        "input_ids": [[7, 7]],
        "labels": [[-100, -100]],
        "answer_positions": [],
    } | ({"position_ids": [[0, 1]]} if packed else {"attention_mask": [[1, 1]]})
    inputs = {key: batch[key] for key in batch.keys() - {"labels", "answer_positions"}}
    assert llama(**inputs).logits.isfinite().all()


def naive_best_fit_decreasing(lengths, max_length):
    """The rows' fill levels, by looking at every open row for every example."""
    fills = []
    for length in sorted(lengths, reverse=True):
        open_rows = [r for r, fill in enumerate(fills) if fill + length <= max_length]
        if open_rows:
            fills[max(open_rows, key=lambda r: fills[r])] += length
        else:
            fills.append(length)
    return sorted(fills)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 18), max_size=40), data=st.data())
def test_packing_is_best_fit_decreasing_and_complete(lengths, data):
    max_length = data.draw(st.integers(max(lengths, default=1), 40))
    rows = pack_rows(torch.tensor(lengths, dtype=torch.int64), max_length)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    fills = sorted(sum(lengths[i] for i in row) for row in rows)
    assert fills == naive_best_fit_decreasing(lengths, max_length)


def test_packing_scales_and_refuses_an_example_longer_than_a_row():
    """A quadratic search over 1e5 examples would take minutes."""
    lengths = torch.randint(20, 300, (100_000,), generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    rows = pack_rows(lengths, 1024)
    assert time.perf_counter() - start < 10
    assert int(lengths.sum()) / (len(rows) * 1024) > 0.99
    with pytest.raises(ValueError, match="Example 2 has 4 tokens and a row holds 3"):
        pack(THREE, 3)
