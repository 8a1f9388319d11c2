"""The noise against what it must be, and the drawn token against transformers' own distribution."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from gem_ds.evaluate.decoding import NextToken, choose
from gem_ds.evaluate.generation import GenerationSettings, Request, sample_seed, uniform
from tests.tiny_evaluation import REFUSED

FINE = 2000


def test_noise_is_uniform_and_its_neighbours_are_unrelated():
    """A poor hash would favour tokens at some positions, or give two samples the same text."""
    numbers = [
        uniform(7, (f"mbpp/{t}", s), p) for t in range(20) for s in range(10) for p in range(50)
    ]
    assert 0 < min(numbers) < max(numbers) < 1
    assert len(set(numbers)) == len(numbers)
    counts = torch.histc(torch.tensor(numbers, dtype=torch.float64), bins=20, min=0, max=1)
    assert ((counts - 500) ** 2 / 500).sum() < 45  # chi-square, 19 degrees: one in 1,400 is above
    pairs = torch.tensor(numbers, dtype=torch.float64)
    assert abs(torch.corrcoef(torch.stack([pairs[:-1], pairs[1:]]))[0, 1]) < 0.04


def test_every_part_of_the_key_counts():
    """And a seed for another generator fits 63 bits."""
    assert uniform(7, ("a", 1), 12) == uniform(7, ("a", 1), 12)
    others = [(8, ("a", 1), 12), (7, ("b", 1), 12), (7, ("a", 2), 12), (7, ("a", 1), 13)]
    others.append((7, ("a", 11), 2))
    assert uniform(7, ("a", 1), 12) not in [uniform(*other) for other in others]
    seeds = {sample_seed(seed, (task, n)) for seed in range(5) for task in "ab" for n in range(5)}
    assert len(seeds) == 50
    assert 0 <= min(seeds) < max(seeds) < 2**63


@settings(max_examples=30)
@given(
    logits=st.lists(st.integers(-90, 90), min_size=2, max_size=9, unique=True),
    temperature=st.floats(0.05, 3),
    top_p=st.floats(0.01, 1),
)
def test_tokens_come_with_the_probabilities_of_transformers(logits, temperature, top_p):
    """Swept finely over (0, 1), the noise must give each token its share and nothing else."""
    row = torch.tensor([logits], dtype=torch.float64) / 8  # no two alike: ties are cut as one likes
    warped = TemperatureLogitsWarper(temperature)(None, row)
    share = warped.softmax(-1).sort(descending=True).values.cumsum(-1)
    if ((share - top_p).abs() < 1e-9).any():
        return  # which token is the last one is then a matter of rounding
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    expected = warped.softmax(-1)[0]
    uniforms = (torch.arange(FINE, dtype=torch.float64) + 0.5) / FINE
    tokens = choose(row.expand(FINE, -1), uniforms, temperature=temperature, top_p=top_p)
    found = torch.bincount(tokens, minlength=len(logits)) / FINE
    torch.testing.assert_close(found.double(), expected, atol=1.01 / FINE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_of_the_noise_and_of_the_temperature(dtype):
    logits = torch.tensor([[-math.inf, 3.0, -math.inf, 1.0, -math.inf]], dtype=dtype)
    ends = torch.tensor([2.0**-53, 1.0], dtype=torch.float64)
    assert choose(logits.expand(2, -1), ends, temperature=1.0, top_p=1.0).tolist() == [1, 3]
    assert choose(logits.expand(2, -1), ends, temperature=1e-30, top_p=1.0).tolist() == [1, 1]
    assert choose(logits.expand(2, -1), ends, temperature=1e30, top_p=1.0).tolist() == [1, 3]
    assert choose(logits.expand(2, -1), ends, temperature=1.0, top_p=1e-9).tolist() == [1, 1]


def requests(*keys):
    return [Request(key=key, prompt_ids=[1], limit=5) for key in keys]


def test_a_row_keeps_its_token_whatever_stands_beside_it():
    sampling = GenerationSettings(max_new_tokens=5, stop_strings=(), temperature=1.0, seed=3)
    torch.manual_seed(0)
    scores, ids = torch.randn(4, 50), torch.zeros(4, 6, dtype=torch.long)
    keys = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    together = NextToken(requests(*keys), sampling, width=4)(ids, scores)
    assert together.isfinite().sum(-1).tolist() == [1, 1, 1, 1]
    for row, key in enumerate(keys):
        alone = NextToken(requests(key), sampling, width=4)(ids[:1], scores[row : row + 1])
        assert torch.equal(alone[0], together[row])


def test_greedy_leaves_the_logits_and_refuses_those_that_are_none():
    greedy = GenerationSettings(max_new_tokens=5, stop_strings=())
    scores = torch.randn(1, 50)
    draw, ids = NextToken(requests(("a", 0)), greedy, width=1), torch.zeros(1, 1)
    assert draw(ids, scores) is scores
    for value in (math.nan, math.inf):
        scores[0, 7] = value
        with pytest.raises(ValueError, match="logits are not finite"):
            draw(ids, scores)


@pytest.mark.parametrize(("options", "message"), REFUSED["generation_settings"])
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GenerationSettings(**({"max_new_tokens": 5, "stop_strings": ()} | options))
