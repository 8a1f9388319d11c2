"""A fingerprint is that of evenly spaced blocks, whatever holds the parameter."""

import hashlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gem_ds.files.fingerprint import differing, fingerprints, sample
from tests.deltas import bytes_of


@given(size=st.integers(0, 5000) | st.integers(0, 2**40))
def test_a_sample_is_of_even_blocks_and_both_ends(size):
    chosen = sample(size).tolist()
    assert chosen == sorted(set(chosen))
    if size <= 1024:
        assert chosen == list(range(size))
        return
    assert len(chosen) == 1024
    assert (chosen[0], chosen[-1]) == (0, size - 1)
    starts = chosen[::64]
    assert all(chosen[i] == starts[i // 64] + i % 64 for i in range(1024))
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_it_is_of_dtype_shape_and_bytes_in_any_layout(dtype):
    numbers = torch.randint(0, 99, (40, 60)).to(dtype)
    whole = bytes_of(numbers)
    size = numbers.element_size()
    sampled = b"".join(whole[i * size : (i + 1) * size] for i in sample(2400).tolist())
    name = str(dtype).removeprefix("torch.")
    expected = {"w": f"{name} 40x60 {hashlib.sha256(sampled).hexdigest()[:16]}"}
    for layout in (numbers, numbers.t().contiguous().t(), torch.stack([numbers] * 2, 2)[..., 1]):
        assert fingerprints({"w": nn.Parameter(layout, requires_grad=False)}) == expected
    flat = fingerprints({"w": nn.Parameter(numbers.flatten(), requires_grad=False)})
    assert flat != expected
    assert differing(expected, flat) == [], "another shape cannot be compared"


def test_scalars_and_empty_parameters_have_one_too():
    found = fingerprints({"s": nn.Parameter(torch.tensor(2.0)), "e": nn.Parameter(torch.empty(0))})
    assert found["s"].startswith("float32 scalar ")
    assert found["e"].startswith("float32 0 ")


def test_only_what_both_have_can_differ():
    recorded = {"a": "float32 2x2 00", "b": "bfloat16 4 11", "c": "float32 3 22", "d": "?"}
    found = {"a": "float32 2x2 01", "b": "float32 4 12", "e": "float32 3 23", "d": "float32 1 1"}
    assert differing(recorded, found) == ["a"]
