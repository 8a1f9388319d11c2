"""What is said of a selection, against numbers counted by hand."""

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.weights import Weights
from gem_ds.sddmm import Pattern
from gem_ds.sparse.entries import SelectedEntries
from gem_ds.sparse.layers import TargetLayer
from gem_ds.train import sparse_tuning
from gem_ds.train.sparse_tuning import SparseTuning
from gem_ds.train.summary import (
    budget_table,
    describe,
    effective_layers,
    kernel_counts,
)
from gem_ds.train.targets import Targets


def test_the_table_adds_up():
    rows = [("a.weight", 1000, 30, 2.5), ("longer.weight", 50, 10, 0.0)]
    header, first, second, last = budget_table(rows).splitlines()
    assert header.split()[:3] == ["weight", "entries", "selected"]
    assert first.split() == ["a.weight", "1,000", "30", "3.000%", "75.00%", "2.500e+00"]
    assert second.split() == ["longer.weight", "50", "10", "20.000%", "25.00%", "0.000e+00"]
    assert last.split() == ["all", "targets", "1,050", "40", "3.810%", "100.00%"]
    assert first.index("1,000") + 5 == second.index("50") + 2 == last.index("1,050") + 5


def test_many_layers_are_told_by_kind():
    """As sums, in the order in which the kinds come first."""
    rows = [(f"m.{i}.{kind}.weight", 100, i, 0.5) for i in range(21) for kind in ("q", "v")]
    assert len(budget_table(rows[:40]).splitlines()) == 42
    _, *kinds, last = budget_table(rows).splitlines()
    assert [line.split() for line in kinds] == [
        [f"m.*.{kind}.weight", "2,100", "210", "10.000%", "50.00%", "1.050e+01"] for kind in "qv"
    ]
    assert last.split()[2:] == ["4,200", "420", "10.000%", "100.00%"]


@given(st.lists(st.integers(0, 10**6), min_size=1).filter(any))
def test_effective_layers_lie_between_one_and_all(budgets):
    effective = effective_layers(budgets)
    num_used = sum(budget > 0 for budget in budgets)
    assert 1 - 1e-9 <= effective <= num_used * (1 + 1e-9)
    assert math.isclose(effective_layers([5] * num_used), num_used)


def test_nearly_zero_weights_are_counted_by_their_size():
    base = torch.tensor([0.0, -0.0, 9e-5, -9e-5, 1.1e-4, -1.1e-4, 0.02, -3.0])
    targets = Targets(names=["a", "b"], num_parameters=200, budget=8)
    indices = [torch.arange(4), torch.arange(4), torch.arange(0)]
    tuning: Any = SimpleNamespace(
        prepared=SimpleNamespace(targets=targets, mask=None),
        selection=None,
        engine=SimpleNamespace(
            dtype=torch.float32, device=torch.device("cpu"), optimizer_state_bytes=lambda: 96
        ),
        entries=SimpleNamespace(flat_indices=indices, kernels=lambda: ["tiled"] * 3),
        head=None,
        layers=indices,
        base=base,
        comm=Comm(torch.device("cpu")),
        num_trainable=8,
    )
    said: list[str] = []
    numbers = describe(tuning, said.append)
    assert numbers.pop("effective_layers") == pytest.approx(2)
    assert numbers == {"selected_near_zero": 4, "num_trainable": 8}
    assert said[0].startswith("Training 8 of 200 parameters (density 4.0000%); optimizer state on")


def test_an_update_below_half_the_last_place_does_not_count_as_a_change():
    base = torch.tensor([1.0, 1.0, -2.0, 0.5], dtype=torch.bfloat16)
    masters = base.float() + torch.tensor([1e-4, 0.01, -1e-4, 0.0])
    for values, share in ((masters.bfloat16(), 0.25), (masters, 0.75)):
        comm = Comm(torch.device("cpu"))
        entries = SimpleNamespace(
            vector=SimpleNamespace(values=nn.Parameter(values)), num_entries=len(values)
        )
        tuning: Any = SimpleNamespace(
            entries=entries,
            base=base.to(values.dtype),
            comm=comm,
            engine=SimpleNamespace(weights=Weights(comm), device=comm.device),
        )
        with mock.patch.object(sparse_tuning, "_CHUNK", 3):
            assert SparseTuning.changed_share(tuning) == share


def test_kernels_are_counted_the_most_frequent_first():
    assert kernel_counts(["gather", "library", "library"]) == "library (2 layers), gather (1)"
    assert kernel_counts(["tiled"]) == "tiled (1 layer)"


def test_a_layer_without_entries_has_no_kernel():
    engine = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    layers = [TargetLayer("weight", nn.Linear(5, 4)) for _ in range(2)]
    patterns = [Pattern.of(torch.arange(count), (4, 5)) for count in (0, 3)]
    entries: Any = SimpleNamespace(engine=engine, kernel="auto", layers=layers, _patterns=patterns)
    assert len(SelectedEntries.kernels(entries)) == 1
    entries.kernel = "tiled"
    assert SelectedEntries.kernels(entries) == ["tiled"]
