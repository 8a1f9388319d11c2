"""Gradients of selected entries, against autograd on a dense copy of the same model."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from gem_ds.models.targets import find_targets
from gem_ds.sddmm import Pattern, product
from gem_ds.sparse.entries import SampledSink
from gem_ds.sparse.layers import NoGradient, Sink, TargetLayer
from gem_ds.sparse.target_layers import TargetLayers
from gem_ds.sparse.used_inputs import among, used_inputs
from tests.tiny import checkpointed, make_model

MODELS = {
    "llama": ("llama", None),
    "llama, all linear": ("llama", ["all-linear"]),
    "opt": ("opt", None),
    "gpt2, transposed": ("gpt2", ["c_attn"]),
    "bert": ("bert", None),
}


class Twins:
    """A model with sinks on random entries of its targets, and a dense copy that trains whole."""

    def __init__(self, model: nn.Module, targets: dict[str, nn.Module]) -> None:
        self.model = model.train()
        self.dense = copy.deepcopy(model).requires_grad_()
        generator = torch.Generator().manual_seed(3)
        self.indices = []
        for i, module in enumerate(targets.values()):
            entries = torch.randperm(module.get_parameter("weight").numel(), generator=generator)
            self.indices.append(entries[: 5 + 3 * i].sort().values.int())
        sizes = [index.numel() for index in self.indices]
        self.layers = TargetLayers(model, targets, sum(sizes))
        self.vector = self.layers.vector
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def sinks(self) -> list[Sink]:
        """One per layer, each with its slice of the flat parameter."""
        return [
            SampledSink(self.vector, start, Pattern.of(index, layer.shape))
            for start, index, layer in zip(self.starts, self.indices, self.layers, strict=True)
        ]

    def backward(self, loss: Callable[[nn.Module], Tensor], *, deliver: bool = True) -> None:
        """Of both; a loss is made of each."""
        self.vector.delivers = deliver
        with self.layers.sinks(self.sinks()):
            found = loss(self.model)
            found.backward()
        expected = loss(self.dense)
        expected.backward()
        torch.testing.assert_close(found, expected)

    def assert_gradient(self, atol: float = 1e-8) -> None:
        """The flat gradient is the dense copy's at the entries; zero where nothing arrived."""
        parts = []
        for layer, index in zip(self.layers, self.indices, strict=True):
            weight = self.dense.get_parameter(layer.name)
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            parts.append(gradient.flatten()[index.long()])
        torch.testing.assert_close(self.vector.values.grad, torch.cat(parts), rtol=1e-5, atol=atol)


def _twins(name: str, is_checkpointed: bool = False) -> Twins:
    architecture, names = MODELS[name]
    model = make_model(architecture, dropout=0.0)
    twins = Twins(model, find_targets(model, names))
    if is_checkpointed:
        checkpointed(model).config.use_cache = False
    return twins


def _ids(seed: int) -> Tensor:
    return torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(seed))


def _loss(model: nn.Module, seed: int = 1) -> Tensor:
    ids = _ids(seed)
    return F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), ids.flip(1).flatten())


CHECKPOINTED = pytest.mark.parametrize(
    "is_checkpointed", [False, True], ids=["plain", "checkpointed"]
)


@CHECKPOINTED
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_dense_model(name, is_checkpointed):
    """And nothing else has one."""
    twins = _twins(name, is_checkpointed)
    runs: list[None] = []
    twins.layers[-1].module.register_forward_pre_hook(lambda *_: runs.append(None))
    twins.backward(_loss)
    assert len(runs) == (2 if is_checkpointed else 1), "a checkpointed block runs again"
    twins.assert_gradient()
    assert (twins.vector.values.grad != 0).all(), "every entry is reached"
    named = dict(twins.model.named_parameters())
    assert [n for n, p in named.items() if p.grad is not None] == ["gem_entries.values"]
    assert [n for n, p in named.items() if p.requires_grad] == ["gem_entries.values"]


@pytest.mark.parametrize("name", MODELS)
def test_a_sink_is_given_the_factors_of_the_whole_gradient(name):
    """And nothing below the first target is differentiated."""
    twins = _twins(name)
    whole: dict[str, Tensor] = {}
    needed: dict[str, bool] = {}

    def sink_of(layer: TargetLayer) -> Sink:
        layer.module.register_forward_pre_hook(
            lambda _, args: needed.update({layer.name: args[0].requires_grad})
        )
        return lambda a, b: whole.update({layer.name: product(a, b)})

    embedding = twins.model.get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_hook(
        lambda _, __, output: needed.update(embedding=output.requires_grad)
    )
    with twins.layers.sinks([sink_of(layer) for layer in twins.layers]):
        _loss(twins.model).backward()
    _loss(twins.dense).backward()
    assert sorted(whole) == sorted(layer.name for layer in twins.layers)
    for layer in twins.layers:
        gradient = twins.dense.get_parameter(layer.name).grad
        assert layer.shape == gradient.shape
        assert layer.numel == gradient.numel()
        torch.testing.assert_close(whole[layer.name], gradient, rtol=1e-5, atol=1e-8)
    assert not needed.pop("embedding")
    in_first_block = {name for name in needed if ".0." in name}
    assert any(not needed[name] for name in in_first_block), "nothing below the first one is"
    assert all(needed[name] for name in needed if name not in in_first_block)


@pytest.mark.parametrize("module", [nn.Linear(7, 5), Conv1D(5, 7)], ids=["linear", "conv1d"])
def test_under_autocast_the_gradients_are_autograds(module):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 7, requires_grad=True)

    def backward(model: nn.Module) -> Tensor | None:
        x.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().square().sum()
        loss.backward()
        return x.grad

    model = nn.Sequential(module)
    expected, weight = backward(copy.deepcopy(model)), module.get_parameter("weight")
    backward(model)
    whole, weight.grad = weight.grad, None
    layers = TargetLayers(model, {"0.weight": module}, 1, vector_name=None)
    seen: list[Tensor] = []
    with layers.sinks([lambda a, b: seen.append(product(a, b))]):
        assert torch.equal(backward(model), expected)
    torch.testing.assert_close(seen[0], whole, rtol=2**-7, atol=0)  # autograd's is rounded to bf16


@CHECKPOINTED
def test_closed_passes_add_up_until_an_open_one_delivers(is_checkpointed):
    twins = _twins("llama", is_checkpointed)
    for _ in range(2):  # a second global batch starts from zero
        twins.vector.values.grad = None
        twins.dense.zero_grad()
        for seed in range(4):
            assert twins.vector.values.grad is None
            twins.backward(lambda model, seed=seed: _loss(model, seed), deliver=seed == 3)
        twins.assert_gradient()
        with pytest.raises(AssertionError, match="no target layer ran its backward"):
            twins.vector.take_gradient()


class Twice(nn.Module):
    """One linear layer used twice in a forward pass, with another between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(6, 6)
        self.between = Conv1D(6, 6)
        self.unused = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 6]."""
        return self.shared(self.between(self.shared(x).tanh()).tanh())


@pytest.mark.parametrize("names", [("shared", "between"), ("shared", "unused")])
def test_a_module_that_runs_twice_in_one_forward_or_never(names):
    model = Twice()
    twins = Twins(model, {f"{n}.weight": getattr(model, n) for n in names})
    inputs = []

    def loss(model: nn.Module) -> Tensor:
        inputs.append(torch.arange(24.0).reshape(2, 2, 6).div(24).requires_grad_())
        return model(inputs[-1]).square().sum()

    for opened in (False, True):
        twins.backward(loss, deliver=opened)
    twins.assert_gradient(atol=1e-7)
    if "unused" in names:
        assert (twins.vector.values.grad[5:] == 0).all()
    mine, theirs = inputs[-2:]  # an input that needs a gradient gets the right one
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_bf16_model_collects_in_fp32_and_delivers_in_bf16():
    """Passes whose gradients are far smaller than what has been collected are not lost."""
    model = Twice()
    layers = TargetLayers(model, {"shared.weight": model.shared}, 6)
    model.bfloat16()
    model.between.weight.data.zero_()  # so that the first use of the layer gets no gradient
    model.between.bias.data.fill_(20.0)  # and the second gets ones, from tanh
    pattern = Pattern.of(torch.arange(6, dtype=torch.int32), (6, 6))
    x = torch.ones(1, 6, dtype=torch.bfloat16)
    with layers.sinks([SampledSink(layers.vector, 0, pattern)]):
        for scale in [1.0] + [2.0**-10] * 1024:
            (model(x).sum() * scale).backward()
        assert layers.vector.buffer is not None
        assert layers.vector.buffer.dtype == torch.float32
        assert layers.vector.buffer.tolist() == [2.0] * 6
        layers.vector.delivers = True
        (model(x).sum() * 2.0).backward()
    assert layers.vector.values.grad.dtype == torch.bfloat16
    assert layers.vector.values.grad.tolist() == [4.0] * 6


@contextmanager
def _saving() -> Iterator[dict[int, Tensor]]:
    """Within the block, what autograd saves of tensors that are no parameters, by their places."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@pytest.mark.parametrize("num_used", [0, 1, 15, 16])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_inputs_that_no_entry_reads_are_not_kept(kind, num_used):
    """Where copies for query and value together take less than half of what both read."""
    torch.manual_seed(0)
    sizes = (24, 64) if kind is Conv1D else (64, 24)  # both map 64 features to 24
    model = nn.ModuleDict({name: kind(*sizes) for name in ("query", "other", "value")})
    targets = {f"{name}.weight": model[name] for name in ("query", "value")}
    indices = []
    for _ in targets:
        selected = torch.zeros(64, 24, dtype=torch.bool)
        selected[torch.randperm(64)[:num_used]] = torch.rand(num_used, 24) < 0.8
        selected = selected if kind is Conv1D else selected.t()
        indices.append(selected.flatten().nonzero().flatten().int())
    layers = TargetLayers(model, targets, sum(map(len, indices)))
    inputs = used_inputs(layers, indices)
    sinks = [
        SampledSink(layers.vector, start, Pattern.of(*among(used, layer, index)), inputs=used)
        for start, used, layer, index in zip(
            (0, len(indices[0])), inputs, layers, indices, strict=True
        )
    ]
    x, dy = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 24)
    layers.renew_anchor()
    with layers.sinks(sinks):
        with _saving() as saved:
            y = model["query"](x) + model["other"](x) - model["value"](x)
        y.backward(dy)
    kept = 2 * num_used if num_used < 16 else 64
    assert sum(tensor.nbytes for tensor in saved.values()) == x.nbytes // 64 * kept
    whole = torch.einsum("bto,bti->oi", dy, x.detach())
    whole = whole.t() if kind is Conv1D else whole
    expected = [whole.flatten()[indices[0].long()], -whole.flatten()[indices[1].long()]]
    torch.testing.assert_close(layers.vector.take_gradient(), torch.cat(expected))


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_layer_whose_gradient_nobody_wants_keeps_nothing_of_its_input(kind):
    """What goes on below it is autograd's, and its own gradient is 0 where it is delivered."""
    torch.manual_seed(0)
    layer = kind(7, 7)
    layers = TargetLayers(nn.ModuleDict({"layer": layer}), {"layer.weight": layer}, 3)
    x, dy = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7)
    for sink in (NoGradient(), NoGradient(layers.vector)):
        layers.renew_anchor()
        with layers.sinks([sink]), _saving() as saved:
            layer(x).backward(dy)
        assert not any(tensor.nbytes for tensor in saved.values())
        matrix = layer.weight.detach()
        torch.testing.assert_close(x.grad, dy @ (matrix.t() if kind is Conv1D else matrix))
        x.grad = None
    assert layers.vector.take_gradient().tolist() == [0] * 3


@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_what_it_did_and_is_given_back(name):
    twins = _twins(name)
    ids = _ids(1)
    expected = twins.dense(input_ids=ids).logits
    assert torch.equal(twins.model(input_ids=ids).logits, expected)
    with torch.no_grad():  # needs no sinks
        assert torch.equal(twins.model(input_ids=ids).logits, expected)
    with torch.inference_mode():
        assert torch.equal(twins.model.eval()(input_ids=ids).logits, expected)
    twins.backward(_loss)
    weights = {n: p.detach() for n, p in twins.dense.named_parameters()}
    assert "gem_entries.values" in twins.model.state_dict()
    twins.layers.detach()
    assert dict(twins.model.named_parameters()).keys() == weights.keys()
    assert twins.model.state_dict().keys() == twins.dense.state_dict().keys()
    assert all(torch.equal(p, weights[n]) for n, p in twins.model.named_parameters())
    assert not any("forward" in vars(module) for module in twins.model.modules())
    assert not twins.model._forward_pre_hooks
    twins.model.requires_grad_()
    twins.dense.zero_grad()
    _loss(twins.model, seed=2).backward()
    _loss(twins.dense, seed=2).backward()
    for name_, parameter in twins.dense.named_parameters():
        torch.testing.assert_close(twins.model.get_parameter(name_).grad, parameter.grad)
    twins.model.zero_grad()
    again = Twins(twins.model, find_targets(twins.model, MODELS[name][1]))
    again.backward(_loss)
    again.assert_gradient()


def test_sinks_leave_with_their_block():
    twins = _twins("llama")
    with twins.layers.sinks(twins.sinks()):
        assert all(layer.sink is not None for layer in twins.layers)
        loss = _loss(twins.model)
    assert all(layer.sink is None for layer in twins.layers)
    with pytest.raises(AssertionError, match=r"layers\.1.*its sink left before the backward"):
        loss.backward()
    with pytest.raises(KeyError), twins.layers.sinks(twins.sinks()):
        raise KeyError("an error in the block")
    assert all(layer.sink is None for layer in twins.layers)
    with pytest.raises(ValueError, match="shorter than"), twins.layers.sinks(twins.sinks()[:-1]):
        pass
