"""Gradients of selected entries, against autograd on a dense copy of the same model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from gem_ds.models.targets import find_targets
from gem_ds.sparse.entries import SampledSink
from gem_ds.sparse.flat_values import FlatValues
from gem_ds.sparse.layers import Conv1DLayer, TargetLayer, TargetLayers
from gem_ds.sparse.sddmm import Pattern, product

VOCABULARY = 50


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def _opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            ffn_dim=20,
            num_hidden_layers=3,
            num_attention_heads=4,
            word_embed_proj_dim=24,
            max_position_embeddings=32,
            dropout=0.0,
        )
    )


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=24,
            n_layer=3,
            n_head=4,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def _bert() -> PreTrainedModel:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], list[str] | None]] = {
    "llama": (_llama, None),
    "llama, all linear": (_llama, ["all-linear"]),
    "opt": (_opt, None),
    "gpt2, transposed": (_gpt2, ["c_attn"]),
    "bert": (_bert, None),
}


@dataclass
class Twins:
    """A model with sinks on random entries of its targets, and a dense copy that trains whole."""

    model: nn.Module
    dense: nn.Module
    layers: TargetLayers
    indices: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module, targets: dict[str, nn.Module]) -> Twins:
        """Copy the model, then take it up with some random entries of each target."""
        model.train()
        dense = copy.deepcopy(model).requires_grad_()
        generator = torch.Generator().manual_seed(3)
        indices = []
        for i, module in enumerate(targets.values()):
            entries = torch.randperm(module.get_parameter("weight").numel(), generator=generator)
            indices.append(entries[: 5 + 3 * i].sort().values.int())
        layers = TargetLayers(model, targets, sum(index.numel() for index in indices))
        return cls(model, dense, layers, indices)

    def sinks(self) -> list[SampledSink]:
        """One sink per layer, each with its slice of the flat parameter."""
        starts = [sum(i.numel() for i in self.indices[:n]) for n in range(len(self.indices))]
        return [
            SampledSink(self.layers.vector, start, Pattern.of(index, layer.shape))
            for start, index, layer in zip(starts, self.indices, self.layers, strict=True)
        ]

    def dense_gradient(self) -> Tensor:
        """The selected entries of the dense copy's gradient, flat; zero where nothing arrived."""
        parts = []
        for layer, index in zip(self.layers, self.indices, strict=True):
            weight = self.dense.get_parameter(layer.name)
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            parts.append(gradient.flatten()[index.long()])
        return torch.cat(parts)


def _twins(name: str) -> Twins:
    make, names = MODELS[name]
    torch.manual_seed(0)
    model = make()
    return Twins.of(model, find_targets(model, names))


def _ids(seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))


def _loss(model: nn.Module, seed: int) -> Tensor:
    ids = _ids(seed)
    return F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), ids.flip(1).flatten())


@pytest.fixture(params=[False, True], ids=["plain", "checkpointed"])
def checkpointed(request: pytest.FixtureRequest) -> bool:
    return request.param


def _checkpoint_blocks(model: nn.Module) -> None:
    # transformers renames the call: the new name where there is one, else the old
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False})
    model.config.use_cache = False  # type: ignore[union-attr]


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_dense_model(name: str, checkpointed: bool) -> None:
    twins = _twins(name)
    if checkpointed:
        _checkpoint_blocks(twins.model)
    runs = []
    twins.layers[-1].module.register_forward_pre_hook(lambda *_: runs.append(1))
    twins.layers.vector.delivers = True
    with twins.layers.sinks(twins.sinks()):
        loss = _loss(twins.model, seed=1)
        loss.backward()
    assert len(runs) == (2 if checkpointed else 1), "a checkpointed block runs again"
    expected = _loss(twins.dense, seed=1)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    gradient = twins.layers.vector.values.grad
    torch.testing.assert_close(gradient, twins.dense_gradient(), rtol=1e-5, atol=1e-8)
    assert (gradient != 0).all(), "every entry is reached"


@pytest.mark.parametrize("name", MODELS)
def test_a_sink_is_given_the_factors_of_the_whole_gradient(name: str) -> None:
    twins = _twins(name)
    seen: dict[str, Tensor] = {}

    def recorder(layer_name: str) -> Callable[[Tensor, Tensor], None]:
        def sink(a: Tensor, b: Tensor) -> None:
            seen[layer_name] = product(a, b)

        return sink

    with twins.layers.sinks([recorder(layer.name) for layer in twins.layers]):
        _loss(twins.model, seed=1).backward()
    _loss(twins.dense, seed=1).backward()
    assert sorted(seen) == sorted(layer.name for layer in twins.layers)
    for layer in twins.layers:
        gradient = twins.dense.get_parameter(layer.name).grad
        assert tuple(gradient.shape) == layer.shape
        assert layer.numel == gradient.numel()
        torch.testing.assert_close(seen[layer.name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("module", [nn.Linear(7, 5), Conv1D(5, 7)], ids=["linear", "conv1d"])
def test_under_autocast_the_gradients_are_autograds(module: nn.Module) -> None:
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


@pytest.mark.parametrize("name", ["llama", "gpt2, transposed"])
def test_closed_passes_add_up_until_an_open_one_delivers(name: str, checkpointed: bool) -> None:
    twins = _twins(name)
    if checkpointed:
        _checkpoint_blocks(twins.model)
    vector = twins.layers.vector
    for _ in range(2):  # a second global batch starts from zero
        vector.values.grad = None
        twins.dense.zero_grad()
        with twins.layers.sinks(twins.sinks()):
            for seed in range(4):
                assert vector.values.grad is None
                vector.delivers = seed == 3
                _loss(twins.model, seed).backward()
                _loss(twins.dense, seed).backward()
        assert vector.buffer is None
        torch.testing.assert_close(vector.values.grad, twins.dense_gradient(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_else_has_a_gradient(name: str, checkpointed: bool) -> None:
    twins = _twins(name)
    if checkpointed:
        _checkpoint_blocks(twins.model)
    twins.layers.vector.delivers = True
    with twins.layers.sinks(twins.sinks()):
        _loss(twins.model, seed=1).backward()
    named = dict(twins.model.named_parameters())
    assert [n for n, p in named.items() if p.grad is not None] == ["gem_entries.values"]
    assert [n for n, p in named.items() if p.requires_grad] == ["gem_entries.values"]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_below_the_first_target_is_differentiated(name: str) -> None:
    twins = _twins(name)
    needed: dict[str, bool] = {}

    def record(layer_name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            needed[layer_name] = args[0].requires_grad

        return hook

    for layer in twins.layers:
        layer.module.register_forward_pre_hook(record(layer.name))
    embedding = twins.model.get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_hook(
        lambda _, __, output: needed.__setitem__("embedding", output.requires_grad)
    )
    with twins.layers.sinks(twins.sinks()):
        _loss(twins.model, seed=1).backward()
    assert not needed.pop("embedding")
    in_first_block = {name for name in needed if ".0." in name}
    assert any(not needed[name] for name in in_first_block), "nothing below the first one is"
    assert all(needed[name] for name in needed if name not in in_first_block)


class Twice(nn.Module):
    """One linear layer used twice in a forward pass, with another between."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.between = Conv1D(6, 6)
        self.unused = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 6]."""
        return self.shared(self.between(self.shared(x).tanh()).tanh())


def test_a_module_that_runs_twice_in_one_forward() -> None:
    torch.manual_seed(0)
    model = Twice()
    twins = Twins.of(model, {f"{n}.weight": getattr(model, n) for n in ("shared", "between")})
    x = torch.randn(4, 6)
    with twins.layers.sinks(twins.sinks()):
        for opened in (False, True):
            twins.layers.vector.delivers = opened
            twins.model(x).square().sum().backward()
            twins.dense(x).square().sum().backward()
    gradient = twins.layers.vector.values.grad
    torch.testing.assert_close(gradient, twins.dense_gradient(), rtol=1e-5, atol=1e-7)


def test_a_layer_that_does_not_run_gets_zeros() -> None:
    torch.manual_seed(0)
    model = Twice()
    twins = Twins.of(model, {f"{n}.weight": getattr(model, n) for n in ("shared", "unused")})
    x = torch.randn(4, 6)
    twins.layers.vector.delivers = True
    with twins.layers.sinks(twins.sinks()):
        twins.model(x).square().sum().backward()
    twins.dense(x).square().sum().backward()
    gradient = twins.layers.vector.values.grad
    torch.testing.assert_close(gradient, twins.dense_gradient(), rtol=1e-5, atol=1e-7)
    assert (gradient[5:] == 0).all()


def test_an_input_that_needs_a_gradient_gets_the_right_one() -> None:
    torch.manual_seed(0)
    model = Twice()
    twins = Twins.of(model, {f"{n}.weight": getattr(model, n) for n in ("shared", "between")})
    mine = torch.randn(2, 3, 6).requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    with twins.layers.sinks(twins.sinks()):
        twins.model(mine).square().sum().backward()
    twins.dense(theirs).square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_bf16_model_collects_in_fp32_and_delivers_in_bf16() -> None:
    """Passes whose gradients are far smaller than what has been collected are not lost."""
    torch.manual_seed(0)
    model = Twice()
    layers = TargetLayers(model, {"shared.weight": model.shared}, 6)
    model.bfloat16()
    model.between.weight.data.zero_()  # so that the first use of the layer gets no gradient
    model.between.bias.data.fill_(20.0)  # and the second gets ones, from tanh
    pattern = Pattern.of(torch.arange(6, dtype=torch.int32), (6, 6))
    sink = SampledSink(layers.vector, 0, pattern)
    x = torch.ones(1, 6, dtype=torch.bfloat16)
    with layers.sinks([sink]):
        for scale in [1.0] + [2.0**-10] * 1024:
            (model(x).sum() * scale).backward()
        assert layers.vector.buffer is not None
        assert layers.vector.buffer.dtype == torch.float32
        assert layers.vector.buffer.tolist() == [2.0] * 6
        layers.vector.delivers = True
        (model(x).sum() * 2.0).backward()
    assert layers.vector.values.grad.dtype == torch.bfloat16
    assert layers.vector.values.grad.tolist() == [4.0] * 6


@pytest.mark.parametrize("name", MODELS)
def test_the_forward_pass_is_that_of_the_model(name: str) -> None:
    twins = _twins(name)
    ids = _ids(1)
    expected = twins.dense(input_ids=ids).logits
    assert torch.equal(twins.model(input_ids=ids).logits, expected)
    with torch.no_grad():  # needs no sinks
        assert torch.equal(twins.model(input_ids=ids).logits, expected)
    twins.model.eval()
    with torch.inference_mode():
        assert torch.equal(twins.model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("name", MODELS)
def test_detach_gives_the_model_back(name: str) -> None:
    twins = _twins(name)
    twins.layers.vector.delivers = True
    with twins.layers.sinks(twins.sinks()):
        _loss(twins.model, seed=1).backward()
    weights = {n: p.detach() for n, p in twins.dense.named_parameters()}
    assert "gem_entries.values" in twins.model.state_dict()
    twins.layers.detach()
    assert dict(twins.model.named_parameters()).keys() == weights.keys()
    assert twins.model.state_dict().keys() == twins.dense.state_dict().keys()
    assert all(torch.equal(p, weights[n]) for n, p in twins.model.named_parameters())
    assert not any("forward" in vars(module) for module in twins.model.modules())
    assert not twins.model._forward_pre_hooks
    twins.model.requires_grad_()
    loss = _loss(twins.model, seed=2)
    loss.backward()
    _loss(twins.dense, seed=2).backward()
    for name_, parameter in twins.dense.named_parameters():
        gradient = twins.model.get_parameter(name_).grad
        assert (gradient is None) == (parameter.grad is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, parameter.grad)


def test_a_model_can_be_taken_up_again() -> None:
    twins = _twins("llama")
    twins.layers.detach()
    again = Twins.of(twins.model, find_targets(twins.model))
    again.layers.vector.delivers = True
    with again.layers.sinks(again.sinks()):
        _loss(again.model, seed=1).backward()
    _loss(again.dense, seed=1).backward()
    gradient = again.layers.vector.values.grad
    torch.testing.assert_close(gradient, again.dense_gradient(), rtol=1e-5, atol=1e-8)


def test_layers_are_a_sequence_in_the_order_of_the_targets() -> None:
    twins = _twins("gpt2, transposed")
    assert len(twins.layers) == 3
    assert [layer.name for layer in twins.layers] == [
        f"transformer.h.{i}.attn.c_attn.weight" for i in range(3)
    ]
    layer = twins.layers[1]
    assert type(layer) is Conv1DLayer
    assert layer.shape == (24, 72)
    assert layer.weight is layer.module.weight
    assert type(_twins("llama").layers[0]) is TargetLayer


def test_sinks_leave_with_their_block() -> None:
    twins = _twins("llama")
    with twins.layers.sinks(twins.sinks()):
        assert all(layer.sink is not None for layer in twins.layers)
        loss = _loss(twins.model, seed=1)
    assert all(layer.sink is None for layer in twins.layers)
    with pytest.raises(AssertionError, match=r"layers\.2.*its sink left before the backward"):
        loss.backward()
    with pytest.raises(KeyError), twins.layers.sinks(twins.sinks()):
        raise KeyError("an error in the block")
    assert all(layer.sink is None for layer in twins.layers)
    with (
        pytest.raises(ValueError, match="shorter than"),
        twins.layers.sinks(twins.sinks()[:-1]),
    ):
        pass


def test_a_flat_vector_that_collected_nothing_says_so() -> None:
    with pytest.raises(AssertionError, match="no target layer ran its backward"):
        FlatValues(3, torch.float32).take_gradient()


def test_a_flat_vector_adds_to_the_slice_of_the_layer() -> None:
    vector = FlatValues(5, torch.float32)
    for start, gradient in (3, [1.0, 2.0]), (0, [7.0]), (4, [0.5]):
        part = vector.gradient(start, len(gradient), torch.device("cpu"))
        part += torch.tensor(gradient)
    assert vector.take_gradient().tolist() == [7.0, 0.0, 0.0, 1.0, 2.5]
    assert vector.buffer is None
    assert vector.values.tolist() == [0.0] * 5
