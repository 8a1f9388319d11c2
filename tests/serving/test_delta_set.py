"""Several deltas on one base: exact swaps, nothing held but entries, and threads that wait."""

import copy
import gc
import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from gem_ds import DeltaSet
from gem_ds.files.delta import Delta
from gem_ds.serving import delta_set
from tests.deltas import bits, make_delta, overwritten

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = {"vocab_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=1, intermediate_size=16, tie_word_embeddings=True)
GPT2 = GPT2Config(vocab_size=24, n_embd=8, n_layer=2, n_head=2, n_positions=16)
MIXTURE = Qwen3MoeConfig(
    **SIZES, num_key_value_heads=1, head_dim=4, num_experts=3, moe_intermediate_size=4
)
Q0 = "model.layers.0.self_attn.q_proj.weight"


def llama(dtype=torch.float32) -> nn.Module:
    return LlamaForCausalLM(LLAMA).to(dtype)


def gpt2(dtype=torch.float32) -> nn.Module:
    """With Conv1D layers, whose weights lie the other way round."""
    return GPT2LMHeadModel(GPT2).to(dtype)


def mixture(dtype=torch.float32) -> nn.Module:
    """With experts, of which a parameter holds several."""
    return Qwen3MoeForCausalLM(MIXTURE).to(dtype)


def random_delta(model: nn.Module, seed: int, share: float = 0.1) -> Delta:
    """Of a random share of every matrix; the tied embedding is one of them."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {
        name: (torch.rand(p.numel(), generator=generator) < share).nonzero().flatten().tolist()
        for name, p in model.named_parameters()
        if p.dim() > 1
    }
    delta = make_delta(model, chosen)
    values = {
        name: torch.randn(len(v), generator=generator).to(v.dtype)
        for name, v in delta.values.items()
    }
    return replace(delta, values=values)


def two_deltas(model):
    """A set of deltas "0" and "1"."""
    deltas = DeltaSet(model)
    for i in range(2):
        deltas.add(str(i), random_delta(model, i))
    return deltas


@settings(deadline=None, max_examples=8)
@given(
    make_model=st.sampled_from([llama, gpt2, mixture]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0.02, 0.5, 1.0]),
    others=st.lists(st.sampled_from([None, "0", "1", "2"]), min_size=1, max_size=12),
)
def test_whatever_was_in_use_a_delta_is_exact_and_so_is_the_base(
    make_model, dtype, seed, share, others
):
    torch.manual_seed(seed)
    model = make_model(dtype)
    found: dict[str | None, Delta | None] = {None: None}
    found |= {str(i): random_delta(model, seed + i, share) for i in range(3)}
    expected = {name: overwritten(model, delta) for name, delta in found.items()}
    deltas = DeltaSet(model)
    for name in ("0", "1", "2"):
        deltas.add(name, found[name])
        deltas.use(name)  # under which the next one is added
        assert bits(model) == expected[name]
    for name in [*others, None]:
        deltas.use(name)
        assert deltas.active == name
        assert bits(model) == expected[name]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_swaps_end_at_the_bits_of_the_base(dtype):
    model = llama(dtype)
    base, parameters = bits(model), dict(model.named_parameters())
    deltas, draw = DeltaSet(model), random.Random(0)
    for i in range(10):
        found = random_delta(model, i, share=0.3)
        with deltas.using(draw.choice([*deltas.names, None])):  # one more onto what stands there
            deltas.add(f"task {i}", found)
    for _ in range(1000):
        with deltas.using(draw.choice([*deltas.names, None])):
            deltas.use(draw.choice([*deltas.names, None]))
    deltas.use("task 3")
    deltas.use(None)
    assert bits(model) == base
    assert all(model.get_parameter(name) is p for name, p in parameters.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def held_bytes() -> int:
    """Of all tensors in this process, memory that several share counted once."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def test_ten_deltas_cost_their_entries_and_no_copy_of_the_model():
    model = llama(torch.bfloat16)
    found = {str(i): random_delta(model, i) for i in range(10)}
    before = held_bytes()
    deltas = DeltaSet(model)
    for name, delta in found.items():
        deltas.add(name, delta)
    for name in found:
        deltas.use(name)
    entries = sum(delta.mask.num_selected for delta in found.values())
    assert held_bytes() - before <= 2 * entries  # the base's bits; the rest is the deltas' own


def test_a_block_restores_what_was_in_use_even_after_an_error():
    model = llama()
    base = bits(model)
    deltas = two_deltas(model)
    deltas.use("0")
    first = bits(model)
    with deltas.using("1") as same:
        assert same is model
        assert bits(model) not in (base, first)
        with deltas.using(None):
            assert bits(model) == base
    assert bits(model) == first
    with pytest.raises(RuntimeError, match="inside"), deltas.using("1"):
        raise RuntimeError("inside")
    assert bits(model) == first
    deltas.remove("0")
    assert (deltas.names, deltas.active) == (["1"], None)
    assert bits(model) == base


def test_a_head_is_swapped_with_its_entries():
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, intermediate_size=16))
    base, head = bits(model), torch.randn(24, 8)
    deltas = DeltaSet(model)
    deltas.add("task", replace(make_delta(model, {Q0: [3]}), head={"lm_head.weight": head}))
    with deltas.using("task"):
        assert torch.equal(model.lm_head.weight, head)
    assert bits(model) == base


def of_another_base(deltas: DeltaSet) -> Delta:
    with deltas.using(None):
        other = copy.deepcopy(deltas.model)
    with torch.no_grad():
        other.model.norm.weight[2] += 1
    return make_delta(other, {Q0: [1, 2]})


REFUSED = {
    "there is a delta 'a' already": lambda deltas, model: deltas.add("a", random_delta(model, 5)),
    r"made for other base weights \(1 of 20 parameters": lambda deltas, model: deltas.add(
        "b", of_another_base(deltas)
    ),
    "there is no delta 'b': there are a": lambda deltas, model: deltas.use("b"),
    r"the model is torch\.bfloat16 now": lambda deltas, model: (model.bfloat16(), deltas.use("a")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_and_the_model_stays(message):
    model = llama()
    deltas = DeltaSet(model)
    deltas.add("a", random_delta(model, 0))
    deltas.use("a")
    before = bits(model.bfloat16() if "bfloat16" in message else model)
    with pytest.raises(ValueError, match=message):
        REFUSED[message](deltas, model)
    assert bits(model) == before
    assert (deltas.names, deltas.active) == (["a"], "a")


@pytest.mark.parametrize("at", [0, 5, 20])
def test_a_swap_that_failed_is_put_right_by_the_next(monkeypatch, at):
    model = llama()
    base = bits(model)
    deltas = two_deltas(model)
    deltas.use("1")
    second = bits(model)
    deltas.use("0")
    left, write = [at], delta_set.write_entries

    def failing(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(delta_set, "write_entries", failing)
        with pytest.raises(torch.OutOfMemoryError):
            deltas.use("1")
    deltas.use("1")
    assert bits(model) == second
    deltas.use(None)
    assert bits(model) == base


def test_a_generation_sees_one_delta_from_its_first_to_its_last_token():
    model = llama()
    deltas = DeltaSet(model)
    expected = {}
    for i in range(3):
        deltas.add(str(i), random_delta(model, i, share=1.0))
        with deltas.using(str(i)):
            expected[str(i)] = bits(model)
    ended, errors = threading.Event(), []

    def swap() -> None:
        while not ended.is_set():
            deltas.use(random.choice([None, *deltas.names]))

    def generate(name: str) -> None:
        for _ in range(6):
            with deltas.using(name):
                for _ in range(3):
                    time.sleep(0.001)  # which lets the other threads run
                    if bits(model) != expected[name]:
                        errors.append(name)

    swapping = threading.Thread(target=swap)
    generating = [threading.Thread(target=generate, args=(name,)) for name in expected]
    for thread in (swapping, *generating):
        thread.start()
    for thread in generating:
        thread.join()
    ended.set()
    swapping.join()
    assert not errors
