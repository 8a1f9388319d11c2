"""Frozen norms: the same outputs, of which layers that read them keep nothing."""

import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from gem_ds.models.targets import find_targets
from gem_ds.sddmm import Pattern
from gem_ds.sparse import layers as layers_module
from gem_ds.sparse import norms
from gem_ds.sparse.entries import SampledSink
from gem_ds.sparse.frozen import give_back, keep_less
from gem_ds.sparse.target_layers import TargetLayers
from tests.tiny import checkpointed, make_model

K = 30  # entries of a layer


def test_llamas_norm_computes_what_it_did():
    """To the bit; its gradient is as near to the exact one as autograd's."""
    torch.manual_seed(0)
    norm = LlamaRMSNorm(48).bfloat16()
    norm.weight.data.uniform_(0.5, 2.0)
    x, dy = torch.randn(2, 3, 5, 48).bfloat16()
    exact = copy.deepcopy(norm).double()
    results = []
    for module in (norm, exact):
        inputs = x.to(module.weight.dtype).requires_grad_()
        results.append(
            (module(inputs), *torch.autograd.grad(module(inputs), inputs, dy.to(inputs)))
        )
    model = nn.Sequential(norm, nn.Linear(48, 1).bfloat16())
    (swapped, _) = keep_less(model)
    assert swapped is norm
    inputs = x.clone().requires_grad_()
    y = norm(inputs)
    assert torch.equal(y, results[0][0])
    (dx,) = torch.autograd.grad(y, inputs, dy)
    errors = [(gradient - results[1][1]).abs().max() for gradient in (dx, results[0][1])]
    assert errors[0] <= 1.1 * errors[1]
    give_back([norm])
    assert "forward" not in vars(norm)


class Trained:
    """A model, some entries of whose targets collect their gradient."""

    def __init__(self, architecture: str, dtype: torch.dtype) -> None:
        self.model = make_model(architecture, dtype, dropout=0.0).train()
        targets = find_targets(self.model, ["all-linear"])
        self.layers = TargetLayers(self.model, targets, K * len(targets))
        random = torch.Generator().manual_seed(0)
        self.sinks = []
        for i, layer in enumerate(self.layers):
            index = torch.randperm(layer.numel, generator=random)[:K].sort().values.int()
            pattern = Pattern.of(index, layer.shape)
            self.sinks.append(SampledSink(self.layers.vector, i * K, pattern))

    def loss(self) -> Tensor:
        """Of one micro-batch."""
        ids = torch.arange(24).view(2, 12) % 40
        options = {} if self.model.config.model_type == "bert" else {"use_cache": False}
        value: Tensor = self.model(input_ids=ids, labels=ids, **options).loss
        return value

    def gradient(self) -> Tensor:
        """Of two micro-batches."""
        with self.layers.sinks(self.sinks):
            for _ in range(2):
                self.loss().backward()
        return self.layers.vector.take_gradient()


CASES = pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", torch.bfloat16), ("opt", torch.float32), ("bert", torch.bfloat16)],
    ids=["llama-bf16", "opt-fp32", "bert-bf16"],
)


@pytest.fixture
def computed(monkeypatch) -> Iterator[list[norms.Recompute]]:
    """What has computed a norm's output again, each time that it did."""
    runs: list[norms.Recompute] = []

    def counting(self: Any, compute: Callable[..., Tensor]) -> None:
        def counted(*kept: Any) -> Tensor:
            runs.append(self)
            return compute(*kept)

        make(self, counted)

    make = norms.Recompute.__init__
    monkeypatch.setattr(norms.Recompute, "__init__", counting)
    return runs


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
@CASES
def test_gradients_are_those_with_the_outputs_kept(
    architecture, dtype, is_checkpointed, monkeypatch, computed
):
    """To the bit."""
    trained = Trained(architecture, dtype)
    if is_checkpointed:
        checkpointed(trained.model)
    found = trained.gradient()
    number = len(computed)
    assert bool(number) != is_checkpointed, "a block that runs again keeps nothing until then"
    monkeypatch.setattr(layers_module, "origin_of", lambda x: None)
    assert torch.equal(trained.gradient(), found)
    assert len(computed) == number, "the outputs were kept"
    assert found.abs().min() > 0


@CASES
def test_no_output_of_a_norm_is_kept(architecture, dtype, computed):
    """Nor computed twice for several readers, nor held when the last one has read it."""
    trained = Trained(architecture, dtype)
    outputs: dict[int, Tensor] = {}
    readers = [layer.module for layer in trained.layers]
    for module in trained.model.modules():
        if type(module).__name__.endswith("Norm"):
            module.register_forward_hook(lambda _, __, y: outputs.update({y.data_ptr(): y}))
    read = set()
    for module in readers:
        module.register_forward_pre_hook(lambda _, args: read.add(args[0].data_ptr()))
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.data_ptr())
        return tensor

    with trained.layers.sinks(trained.sinks):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = trained.loss()
        loss.backward()
    # The first block's input needs no gradient, so that its norm keeps nothing itself.
    made = {place for place in read & outputs.keys() if hasattr(outputs[place], "gem_ds_origin")}
    assert len(made) >= trained.model.config.num_hidden_layers
    assert len(computed) == len(made) == len(set(computed))
    inputs = {
        origin.kept[0].data_ptr() for origin in map(norms.origin_of, outputs.values()) if origin
    }
    assert not (saved & made) - inputs, "an output is kept that is no other norm's input"
    assert all(recompute._output is None for recompute in computed)


def test_an_output_that_was_changed_in_place_is_kept_as_it_is():
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x).mul_(3))

    torch.manual_seed(0)
    model, x, dy = Changed(), torch.randn(5, 6, requires_grad=True), torch.randn(5, 4)
    dense = copy.deepcopy(model)
    dense(x).backward(dy)
    layers = TargetLayers(model, {"linear.weight": model.linear}, 24, vector_name=None)
    layers.renew_anchor()
    sink = SampledSink(layers.vector, 0, Pattern.of(torch.arange(24), (4, 6)))
    with layers.sinks([sink]):
        model(x).backward(dy)
    found = layers.vector.take_gradient().view(4, 6)
    torch.testing.assert_close(found, dense.linear.weight.grad)


def test_a_norm_that_autocast_computes_in_another_dtype_has_its_output_kept():
    """As a GPU's does with torch's norm of 16 bits; the backward pass is without autocast."""
    norm = nn.LayerNorm(6).bfloat16().requires_grad_(False)
    keep_less(norm)
    x = torch.randn(5, 6, dtype=torch.bfloat16, requires_grad=True)
    assert norms.origin_of(norm(x)) is not None
    real = F.layer_norm
    with mock.patch.object(F, "layer_norm", lambda *args: real(*args).float()):
        assert norms.origin_of(norm(x)) is None


def test_the_gradient_of_a_graph_that_is_retained_is_the_same_again():
    trained = Trained("opt", torch.float32)
    with trained.layers.sinks(trained.sinks):
        loss = trained.loss()
        loss.backward(retain_graph=True)
        once = trained.layers.vector.take_gradient()
        loss.backward()
    assert torch.equal(trained.layers.vector.take_gradient(), once)
