"""Deltas in the layout of an inference engine: as if it had loaded the trained checkpoint."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gem_ds import VllmDeltas, apply_delta
from tests.deltas import bits, make_delta
from tests.serving.engine import LLM
from tests.serving.test_delta_set import DTYPES, random_delta

SIZES = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
MORE = {"vocab_size": 30, "intermediate_size": 16, "num_hidden_layers": 2}
V1 = "model.layers.1.self_attn.v_proj.weight"


def checkpoint(dtype=torch.bfloat16, *, tied=False, experts=False):
    if experts:
        own = {"num_experts": 3, "moe_intermediate_size": 8, "head_dim": 2}
        config = Qwen3MoeConfig(**SIZES, **MORE, **own, tie_word_embeddings=tied)
        return Qwen3MoeForCausalLM(config).to(dtype)
    config = LlamaConfig(**SIZES, **MORE, tie_word_embeddings=tied, head_dim=2)
    return LlamaForCausalLM(config).to(dtype)


def all_bits(llm):
    return [bits(worker.get_model()) for worker in llm.workers]


def as_if_loaded(base, world_size, delta):
    """Bits of an engine that was given the trained weights."""
    trained = copy.deepcopy(base)
    apply_delta(trained, delta)
    return all_bits(LLM(trained, world_size))


@pytest.mark.parametrize("experts", [False, True])
@settings(deadline=None, max_examples=5)
@given(
    world_size=st.sampled_from([1, 2, 4]),  # 4 repeat the two key heads
    dtype=st.sampled_from(DTYPES),
    tied=st.booleans(),
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0.01, 0.4, 1.0]),
)
def test_swaps_are_what_loading_the_trained_weights_gives(
    world_size, dtype, tied, seed, share, experts
):
    """Checkpoints have each expert's matrices apart, vLLM those of all together."""
    torch.manual_seed(seed)
    base = checkpoint(dtype, tied=tied, experts=experts)
    llm = LLM(base, world_size)
    before = all_bits(llm)
    deltas = VllmDeltas(llm)
    found = {str(i): random_delta(base, seed + i, share) for i in range(2)}
    expected = {name: as_if_loaded(base, world_size, delta) for name, delta in found.items()}
    for name, delta in found.items():
        deltas.add(name, delta)
        assert all_bits(llm) == before
    for name in ("0", "1", None, "1"):
        llm.cached = ["prefix", "image"]
        deltas.use(name)
        assert all_bits(llm) == expected.get(name, before)
        assert llm.cached == []
    deltas.remove("1")
    assert all_bits(llm) == before


def of_another_base(base):
    other = copy.deepcopy(base)
    other.get_parameter(V1).data.view(-1)[5] += 1
    return make_delta(other, {V1: [5]})


def with_an_unknown_weight(base):
    base.extra = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    return make_delta(base, {"extra.weight": [1]})


REFUSED = {
    r"made for other base weights \(1 of 1 weights differ": of_another_base,
    r"the loader of ShardedLlama does not take 'extra.weight'": with_an_unknown_weight,
    r"the delta is float32 and the model has .* in bfloat16": lambda base: make_delta(
        copy.deepcopy(base).float(), {V1: [5]}
    ),
    "the delta has a task head": lambda base: replace(
        make_delta(base, {V1: [5]}), head={"score": torch.zeros(2)}
    ),
    "there is a delta 'a' already": lambda base: make_delta(base, {V1: [5]}),
    "no place for 1 of 2 entries of 'lm_head.weight'": lambda base: make_delta(
        base, {"lm_head.weight": [0, 239]}
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_and_every_worker_stays(message):
    base = checkpoint()
    llm = LLM(base, 2)
    deltas = VllmDeltas(llm)
    deltas.add("a", random_delta(base, 0))
    deltas.use("a")
    before = all_bits(llm)
    if "no place" in message:  # as if a worker of a pipeline were not there
        llm.workers.pop()
        before.pop()
    with pytest.raises(ValueError, match=message):
        deltas.add("a" if "already" in message else "b", REFUSED[message](base))
    assert all_bits(llm) == before
    with pytest.raises(ValueError, match="there is no delta 'b': there are a"):
        deltas.use("b")
    assert all_bits(llm) == before


def test_a_delta_that_one_worker_cannot_take_is_in_none(monkeypatch):
    """As a full disk, or a folder that another machine does not have, would end it."""
    base = checkpoint()
    llm = LLM(base, 2)
    deltas, before = VllmDeltas(llm), all_bits(llm)
    write = Path.write_bytes

    def fail_on_the_second(path, data):
        if path.name == "1.safetensors":
            raise OSError("no space left")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail_on_the_second)
        with pytest.raises(ValueError, match="no space left"):
            deltas.add("a", random_delta(base, 0))
    assert all_bits(llm) == before
    deltas.add("a", random_delta(base, 1))
    deltas.use("a")
    assert all_bits(llm) != before


def test_running_requests_keep_their_weights_and_later_ones_meet_no_old_caches():
    base = checkpoint()
    llm = LLM(base, 2)
    deltas = VllmDeltas(llm)
    deltas.add("a", random_delta(base, 0))
    before, llm.running = all_bits(llm), True
    with pytest.raises(ValueError, match="swap deltas when they are done"):
        deltas.use("a")
    assert all_bits(llm) == before
    llm.running, llm.cached = False, ["prefix", "image"]
    deltas.use("a")
    assert all_bits(llm) != before
    assert llm.cached == []


@pytest.mark.parametrize("fault", ["arithmetic", "cast"])
def test_a_loader_that_does_more_than_copy_is_refused(monkeypatch, fault):
    """Gemma-like offsets, or weights that are cast on their way: the places would be wrong."""
    base = checkpoint()
    llm = LLM(base, 1)
    load = type(llm.workers[0].get_model())._load

    def changed(self, param, part, weight):
        load(self, param, part, weight + 1 if fault == "arithmetic" else weight.to(param.dtype))

    monkeypatch.setattr(type(llm.workers[0].get_model()), "_load", changed)
    before = all_bits(llm)
    with pytest.raises(ValueError, match=f"does more with '{V1}' than to copy it"):
        VllmDeltas(llm).add("a", make_delta(base, {V1: [5, 6]}))
    assert all_bits(llm) == before


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flipped(path):
    payload = bytearray(path.read_bytes())
    payload[-3] ^= 1
    path.write_bytes(payload)


@pytest.mark.parametrize(
    ("damage", "message"), [(cut, "is not a whole safetensors file"), (flipped, "is damaged")]
)
def test_a_worker_tells_of_a_damaged_file_and_keeps_its_weights(tmp_path, damage, message):
    base = checkpoint()
    llm = LLM(base, 2)
    before = all_bits(llm)
    path = tmp_path / "delta.safetensors"
    random_delta(base, 0).save(path)
    damage(path)
    for told in llm.collective_rpc("gem_add_delta", args=("a", str(path), str(tmp_path))):
        assert message in told
    for told in llm.collective_rpc("gem_use_delta", args=("a",)):
        assert told.startswith("there is no delta 'a'")
    assert (
        llm.collective_rpc("gem_receive") == ["no trainer is connected: call gem_connect first"] * 2
    )
    assert all_bits(llm) == before
