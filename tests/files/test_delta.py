"""Base + delta is the trained model, revert the base, bit for bit; a misfit touches nothing."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from gem_ds.files import apply as apply_module
from gem_ds.files.apply import apply_delta
from gem_ds.files.delta import DELTA_KIND, Delta
from gem_ds.files.mask import Mask
from gem_ds.files.tensors import load_tensors, save_tensors
from tests.deltas import bits, bytes_of, make_delta, overwritten

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


SIZES = {"vocab_size": 24, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_llama(*, tied: bool = True) -> PreTrainedModel:
    more = {"num_key_value_heads": 1, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **more, intermediate_size=16))


def tiny_opt() -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**SIZES, word_embed_proj_dim=8, ffn_dim=16))


Q0 = "model.layers.0.self_attn.q_proj.weight"
V1 = "model.layers.1.self_attn.v_proj.weight"
CHOSEN = {Q0: [0, 9, 63], V1: [3], "model.layers.0.self_attn.v_proj.weight": []}


# Files


def content(delta: Delta) -> list[tuple[str, torch.dtype, bytes]]:
    tensors = [*delta.mask.indices.items(), *delta.values.items(), *delta.head.items()]
    return [(name, tensor.dtype, bytes_of(tensor)) for name, tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_delta_comes_back_from_its_file(tmp_path, dtype):
    delta = make_delta(tiny_llama().to(dtype), CHOSEN)
    head = {"score.weight": torch.randn(3, 8), "mask.indices": torch.tensor([1])}
    delta = replace(delta, head=head)
    delta.save(tmp_path / "delta.safetensors")
    loaded = Delta.load(tmp_path / "delta.safetensors")
    assert loaded.mask.weights == delta.mask.weights
    assert loaded.mask.settings == delta.mask.settings
    assert loaded.dtype == dtype
    assert content(loaded) == content(delta)


def test_a_delta_is_shown_in_a_line():
    delta = make_delta(tiny_llama(), CHOSEN)
    mask = "Mask(gem: 4 of 128 entries (3.1250%) in 3 weights of base)"
    assert repr(delta.mask) == mask
    assert repr(delta) == f"Delta(values of {mask})"
    with_head = replace(delta, head={"a": torch.zeros(90, 20), "b": torch.zeros(8)})
    assert repr(with_head) == f"Delta(values of {mask}, and a head of 1,808)"


DAMAGES = {
    f"'{Q0}' has no indices": {f"{Q0}.indices": None},
    f"'{Q0}' has no values": {f"{Q0}.values": None},
    rf"'{Q0}' have shape \(2,\) for 3 indices": {f"{Q0}.values": torch.zeros(2)},
    rf"'{Q0}' have shape \(3, 1\) for 3 indices": {f"{Q0}.values": torch.zeros(3, 1)},
    f"'{Q0}' are bfloat16 for a float32 weight": {f"{Q0}.values": torch.zeros(3).bfloat16()},
    f"'{Q0}' hold NaN or infinity": {f"{Q0}.values": torch.tensor([0.0, torch.nan, 1.0])},
    "'score.weight' is missing": {"head.score.weight": None},
    "'score.bias', which its metadata does not describe": {"score.bias": torch.zeros(2)},
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_file_with_bad_tensors_is_refused(tmp_path, message):
    path = tmp_path / "delta.safetensors"
    delta = make_delta(tiny_llama(), CHOSEN)
    replace(delta, head={"score.weight": torch.zeros(2, 8)}).save(path)
    tensors, metadata = load_tensors(path, DELTA_KIND)
    changed = {**tensors, **DAMAGES[message]}
    tensors = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_tensors(path, tensors, metadata, kind=DELTA_KIND)
    with pytest.raises(ValueError, match=message) as caught:
        Delta.load(path)
    assert str(caught.value).startswith(f"{path} cannot be used: ")


def test_a_mask_file_is_no_delta_and_values_belong_to_a_mask_or_a_head(tmp_path):
    delta = make_delta(tiny_llama(), CHOSEN)
    for saved, kind, message in ((delta.mask, Delta, "a delta file"), (delta, Mask, "a mask file")):
        saved.save(tmp_path / "f")
        with pytest.raises(ValueError, match=f"pass {message}"):
            kind.load(tmp_path / "f")
    with pytest.raises(ValueError, match="'x' has values but no indices"):
        replace(delta, values={**delta.values, "x": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"'{Q0}' is in the mask and in the head"):
        replace(delta, head={Q0: torch.zeros(8, 8)})


# Apply and revert


@pytest.mark.parametrize(
    ("make_model", "dtype"), [(tiny_llama, torch.bfloat16), (tiny_opt, torch.float32)]
)
def test_apply_changes_the_entries_and_nothing_else_and_revert_restores_all(make_model, dtype):
    model = make_model().to(dtype)
    name = next(name for name, _ in model.named_parameters() if name.endswith("q_proj.weight"))
    embedding = next(iter(dict(model.named_parameters())))  # tied to the output layer
    delta = make_delta(model, {name: [1, 8, 62], embedding: [0, 17]})
    base, trained = bits(model), overwritten(model, delta)
    assert trained != base
    parameters = dict(model.named_parameters())
    applied = apply_delta(model, delta)
    assert bits(model) == trained
    assert all(model.get_parameter(name) is parameters[name] for name in parameters)
    assert all(parameter.grad_fn is None for parameter in parameters.values())
    applied.revert()
    assert bits(model) == base


def test_a_tied_weight_is_reached_by_either_name_and_stays_tied():
    model = tiny_llama(tied=True)
    base = bits(model)
    with apply_delta(model, make_delta(model, {"lm_head.weight": [5]})):
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert bits(model)["model.embed_tokens.weight"] != base["model.embed_tokens.weight"]
    assert bits(model) == base


class Matrix(nn.Module):
    """One weight of given content and layout."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 2**32),
    is_transposed=st.booleans(),
    is_strided=st.booleans(),
)
def test_any_bits_survive_in_any_layout(dtype, shape, seed, is_transposed, is_strided):
    """NaN payloads, -0.0, subnormals: a copy through arithmetic would lose them."""
    generator = torch.Generator().manual_seed(seed)
    size = shape[0] * shape[1]
    raw = torch.randint(256, (size * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    weight = raw.view(dtype).reshape(shape)
    weight.view(-1)[-2:] = torch.tensor([-torch.nan, -0.0], dtype=dtype)[-size:]
    if is_transposed:
        weight = weight.t()
    if is_strided:
        weight = torch.stack([weight, weight], dim=2)[:, :, 1]  # every second element of storage
    model = Matrix(weight)
    chosen = (torch.rand(size, generator=generator) < 0.5).nonzero().flatten().tolist()
    delta = make_delta(model, {"weight": chosen})
    base, trained = bits(model), overwritten(model, delta)
    with apply_delta(model, delta):
        assert bits(model) == trained
    assert bits(model) == base


def test_a_revert_that_failed_goes_on_where_it_stopped(monkeypatch):
    model = tiny_llama()
    before = bits(model)
    applied = apply_delta(model, make_delta(model, CHOSEN))
    write, results = apply_module.write_entries, iter([True, False])

    def failing_once(*arguments):
        if not next(results, True):
            raise torch.OutOfMemoryError
        write(*arguments)

    monkeypatch.setattr(apply_module, "write_entries", failing_once)
    with pytest.raises(torch.OutOfMemoryError):
        applied.revert()
    assert bits(model) != before
    applied.revert()
    assert bits(model) == before


def test_the_context_manager_reverts_after_an_error_and_only_once():
    model = tiny_llama()
    base = bits(model)
    with pytest.raises(RuntimeError, match="inside"), apply_delta(model, make_delta(model, CHOSEN)):
        raise RuntimeError("inside")
    assert bits(model) == base
    applied = apply_delta(model, make_delta(model, CHOSEN))
    applied.revert()
    with torch.no_grad():
        model.get_parameter(Q0).fill_(3.0)
    applied.revert()  # must not write over what was done since
    assert (model.get_parameter(Q0) == 3.0).all()


def test_a_head_is_replaced_as_a_whole_and_restored():
    model = tiny_llama(tied=False)
    head = {"lm_head.weight": torch.randn(24, 8)}
    delta = replace(make_delta(model, CHOSEN), head=head)
    base = bits(model)
    with apply_delta(model, delta):
        assert torch.equal(model.lm_head.weight, head["lm_head.weight"])
        assert bits(model) != base
    assert bits(model) == base
    for misfit in ({"score": torch.zeros(2)}, {"lm_head.weight": torch.zeros(8, 24)}):
        with pytest.raises(ValueError, match="load it with the class that was trained"):
            apply_delta(model, replace(delta, head=misfit))
    assert bits(model) == base


# A misfit is refused before anything is written


def test_a_delta_that_is_applied_already_is_refused():
    model = tiny_llama()
    delta = make_delta(model, CHOSEN)
    applied = apply_delta(model, delta)
    trained = bits(model)
    with pytest.raises(ValueError, match=r"applied already.* revert it first"):
        apply_delta(model, delta)
    assert bits(model) == trained
    applied.revert()
    apply_delta(model, delta)
    assert bits(model) == trained


def test_two_deltas_stand_together_where_they_do_not_overlap():
    model = tiny_llama()
    base = bits(model)
    first, second = make_delta(model, {Q0: [0, 9]}), make_delta(model, {Q0: [1, 10]})
    overlapping = make_delta(model, {Q0: [9, 10]})
    with apply_delta(model, first):
        with apply_delta(model, second):
            assert model.get_parameter(Q0).flatten()[0] == first.values[Q0][0]
            assert model.get_parameter(Q0).flatten()[10] == second.values[Q0][1]
        with pytest.raises(ValueError, match="other base weights"):
            apply_delta(model, overlapping)
    assert bits(model) == base
    third = make_delta(model, {V1: [5]})
    apply_delta(model, first)  # whose handle nobody keeps
    apply_delta(model, second).revert()
    apply_delta(model, second)
    apply_delta(model, third).revert()
    model.get_parameter(Q0).data[7, 7] += 1  # which is no delta's
    with pytest.raises(ValueError, match=f"1 of 20 .* beyond .* the first is '{Q0}'"):
        apply_delta(model, third)


def change_one_base_value(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.get_parameter(V1).view(-1)[3].neg_()
    return model


@pytest.mark.parametrize(
    ("make_other", "message"),
    [
        (change_one_base_value, f"1 of 3 weights .* '{V1}'.: use base"),
        (lambda model: tiny_llama(), "made for other base weights"),
        (lambda model: tiny_opt(), "which OPTForCausalLM does not have: use the base model"),
        (lambda model: model.bfloat16(), r"load the model with dtype=torch\.float32"),
        (lambda model: nn.Sequential(model), "which Sequential does not have"),
    ],
)
def test_another_model_is_refused_untouched(make_other, message):
    torch.manual_seed(0)
    model = tiny_llama()
    delta = make_delta(model, CHOSEN)
    other = make_other(model)
    before = bits(other)
    with pytest.raises(ValueError, match=message):
        apply_delta(other, delta)
    assert bits(other) == before


def scaled_but_at_the_entries(model: nn.Module) -> str:
    delta = make_delta(model, CHOSEN)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            before = parameter.flatten()[CHOSEN.get(name, [])].clone()
            parameter.mul_(1.5)
            parameter.view(-1)[CHOSEN.get(name, [])] = before
    delta.mask.check_base({n: model.get_parameter(n).flatten()[i] for n, i in CHOSEN.items()})
    return r"\(\d+ of 21 parameters differ beyond"


def fine_tuned_norms(model: nn.Module) -> str:
    model.get_parameter("model.norm.weight").data[2] += 0.01
    return r"\(1 of 21 .* the first is 'model.norm.weight'"


def one_layer_of_another(model: nn.Module) -> str:
    up, down = (model.get_parameter(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1))
    up.data, down.data = down.data, up.data
    return r"\(2 of 21 "


@pytest.mark.parametrize(
    "change", [scaled_but_at_the_entries, fine_tuned_norms, one_layer_of_another]
)
def test_a_base_that_differs_beyond_the_entries_is_refused_untouched(change):
    model = tiny_llama(tied=False)
    delta = make_delta(model, CHOSEN)
    message = change(model)
    before = bits(model)
    with pytest.raises(ValueError, match=f"this delta was made for other base weights {message}"):
        apply_delta(model, delta)
    assert bits(model) == before


def test_what_cannot_be_compared_is_no_other_base():
    """Embeddings of more tokens, norms kept in fp32, a head of another task, an older file."""
    model = tiny_llama(tied=False).bfloat16()
    delta = make_delta(model, CHOSEN)
    model.lm_head = nn.Linear(8, 3, bias=True)
    model.resize_token_embeddings(32)
    model.model.norm.float()
    apply_delta(model, delta).revert()
    model.model.layers[0].mlp.bfloat16().up_proj.weight.data.zero_()
    old = replace(delta, mask=replace(delta.mask, fingerprints={}))
    apply_delta(model, old).revert()
    with pytest.raises(ValueError, match=r"mlp.up_proj"):
        apply_delta(model, delta)


def test_several_dtypes_have_no_common_one():
    model = tiny_llama()
    model.model.layers[1].bfloat16()
    delta = make_delta(model, CHOSEN)
    with pytest.raises(ValueError, match=r"several dtypes \(bfloat16, float32\)"):
        _ = delta.dtype
    with apply_delta(model, delta):
        assert model.get_parameter(V1).flatten()[3] == delta.values[V1][0]


def test_a_model_in_which_a_delta_stands_is_freed_with_it():
    model = nn.Linear(8, 8)
    apply_delta(model, make_delta(model, {"weight": [3, 9]}))
    weight = weakref.ref(model.weight)
    del model
    gc.collect()
    assert weight() is None
