"""Adapters of experts beside dense masked AdamW of what transformers computes by itself.

Training, lifecycle, files. A base computes its experts in another order than an adapter, so their
logits are equal to rounding, and weights to the bit.
"""

import copy
import json
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import gem_ds
from gem_ds.files.apply import apply_delta
from gem_ds.files.delta import Delta
from gem_ds.sddmm import grouped
from gem_ds.tuner import GemConfig, adapter_to_delta, delta_to_adapter
from tests.deltas import bits
from tests.tiny import checkpointed, make_model
from tests.tuner.test_tuner import (
    RATE,
    WEIGHTS,
    batch,
    delta_of,
    entries_of,
    fill,
    logits,
    same,
    train,
    train_densely,
    wrapped,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
    pytest.mark.filterwarnings("ignore:Already unmerged"),  # layers of the other adapter
]

KINDS = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


def mixture(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Always the same; biases and routers are random too, and experts computed one by one."""
    model = make_model(kind, dtype, 0.0).eval()
    model.config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "experts" in name or "gate" in name or "router" in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def of_projection(delta: Delta, projection: str) -> Delta:
    """The part of a delta."""
    mask = delta.mask
    names = [name for name in delta.values if name.endswith(projection)]
    indices = {name: mask.indices[name] for name in names}
    weights = {name: mask.weights[name] for name in names}
    mask = replace(mask, indices=indices, weights=weights)
    return Delta(mask=mask, values={name: delta.values[name] for name in names})


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recomputes", [False, True])
def test_training_is_dense_masked_adamw_and_the_base_stays(kind, recomputes):
    dense, model = mixture(kind), mixture(kind)
    mask, before, base = delta_of(model).mask, bits(model), logits(model)
    expected = train_densely(dense, mask, 20, RATE / 5)
    model = wrapped(checkpointed(model).train() if recomputes else model, mask)
    assert model.get_nb_trainable_parameters()[0] == mask.num_selected
    close(logits(model), base)
    found = train(model, 20, rate=RATE / 5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    entries = {name: own.values.detach().clone() for name, own in entries_of(model).items()}
    assert entries.keys() == mask.indices.keys()
    for name, values in entries.items():
        now = dense.get_parameter(name).detach().view(-1)[mask.indices[name].long()]
        torch.testing.assert_close(values, now, rtol=1e-5, atol=1e-5)

    model.eval()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    fresh = mixture(kind)
    apply_delta(fresh, Delta(mask=mask, values=entries))
    close(logits(model), logits(fresh))
    assert bits(copy.deepcopy(model).merge_and_unload()) == bits(fresh)
    assert bits(model.unload()) == before
    assert torch.equal(logits(model.base_model.model), base)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["fp32", "fp32 in one launch", "bf16", "autocast"])
def test_the_gradient_is_that_of_the_substituted_model(kind, how, monkeypatch):
    """And is none where neither the values nor what is below want one."""
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    monkeypatch.setattr(grouped, "takes_one_launch", lambda *_: "one launch" in how)
    model, dense = mixture(kind, dtype), mixture(kind, dtype)
    delta = delta_of(model)
    apply_delta(dense, delta)
    model = fill(wrapped(model, delta.mask), delta)
    for each in (model, dense):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = each(**batch()).loss
        loss.backward()
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, entries in entries_of(model).items():
        assert entries.values.dtype == torch.float32
        gradient, whole = entries.values.grad, dense.get_parameter(name).grad
        assert gradient is not None
        assert whole is not None
        pairs.append((gradient, whole.view(-1)[delta.mask.indices[name].long()].float()))
        if "fp32" in how:
            torch.testing.assert_close(*pairs[-1], rtol=1e-4, atol=1e-6)
    found, expected = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    assert (found - expected).norm() < 0.15 * expected.norm()
    assert not any(p.grad is not None for n, p in model.named_parameters() if "gem_" not in n)
    model.requires_grad_(False)
    assert not model(**batch()).loss.requires_grad


def test_adapters_come_and_go():
    model = mixture("gpt_oss")
    first, second, base = delta_of(model, 1), delta_of(model, 2), logits(model)
    second = of_projection(second, "down_proj")
    expected = []
    for delta in (first, second):
        with apply_delta(model, delta):
            expected.append(logits(model))
    model = fill(wrapped(model, first.mask), first)
    model.add_adapter("second", GemConfig(mask=second.mask))
    assert entries_of(model, "second").keys() == second.values.keys()
    fill(model, second, "second")
    close(logits(model), expected[0])
    model.set_adapter("second")
    close(logits(model), expected[1])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [name for name in trained if ".second." in name]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(logits(copied), expected[1])
    model.merge_adapter(["second"])
    assert torch.equal(logits(model), expected[1])
    model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("second")
    close(logits(model), expected[0])
    experts = model.base_model.model.model.layers[1].mlp.experts
    experts.entries_of("default")["down_proj"].values.data[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        experts.merge(safe_merge=True)
    assert torch.equal(logits(model.unload()), base)


def test_experts_are_named_by_their_projections():
    """By these or their module's name, among all linear layers, and left out."""
    mask = delta_of(mixture("deepseek_v3")).mask

    def taken(**named: Any) -> set[str]:
        model = get_peft_model(mixture("deepseek_v3"), GemConfig(mask=mask, **named))
        return set(entries_of(model))

    both = {name for name in mask.indices if not name.endswith(".weight")}
    down = {name for name in both if name.endswith("down_proj")}
    assert both > down > set()
    assert taken(target_modules=["experts"]) == both
    assert taken(target_modules=["experts.down_proj"]) == down
    assert taken(target_modules=r".*\.experts\.down_proj") == down
    assert taken(target_modules=["q_b_proj", "gate_up_proj"]) & both == both - down
    assert taken(target_modules="all-linear") == taken() == set(mask.indices)
    assert taken(exclude_modules=["experts"]) == set(mask.indices) - both
    with pytest.warns(UserWarning, match="no modules were excluded"):
        found = taken(target_modules="all-linear", exclude_modules=["experts.down_proj"])
    assert found == set(mask.indices) - down
    dense_block = {name for name in mask.indices if "layers.0.mlp.down_proj" in name}
    assert taken(target_modules=["mlp.down_proj"]) == dense_block != set()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_saved_loaded_and_a_delta(kind, tmp_path):
    """By peft and by transformers; to the bit."""
    model = mixture(kind)
    delta, base = delta_of(model), logits(model)
    model = fill(wrapped(model, delta.mask), delta)
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    assert sum(t.nbytes for t in saved.values()) == 8 * delta.mask.num_selected
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["num_entries"].keys() == {n.removesuffix(".weight") for n in delta.values}
    for low in (False, True):
        loaded: Any = PeftModel.from_pretrained(
            mixture(kind), str(tmp_path / "adapter"), low_cpu_mem_usage=low
        )
        assert torch.equal(logits(loaded), expected)
        assert loaded.load_adapter(str(tmp_path / "adapter"), "other").missing_keys == []
    plain = mixture(kind)
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(plain), expected)
    plain.save_pretrained(str(tmp_path / "again"))
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert {n: bytes(t.numpy()) for n, t in again.items()} == {
        n: bytes(t.numpy()) for n, t in saved.items()
    }
    plain.disable_adapters()
    assert torch.equal(logits(plain), base)

    found = adapter_to_delta(tmp_path / "adapter")
    same(Delta(mask=replace(found.mask, base_model="base"), values=found.values), delta)
    delta_to_adapter(delta, tmp_path / "made")
    made = load_file(tmp_path / "made" / WEIGHTS)
    assert made.keys() == saved.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in saved.items())
    merged = PeftModel.from_pretrained(mixture(kind), str(tmp_path / "made")).merge_and_unload()
    fresh = mixture(kind)
    apply_delta(fresh, delta)
    assert bits(merged) == bits(fresh)

    other = mixture(kind)
    name = next(name for name in delta.values if not name.endswith(".weight"))
    other.get_parameter(name).data.view(-1)[int(delta.mask.indices[name][1])] += 1
    before = bits(other)
    with pytest.raises(ValueError, match="other weights there"):
        PeftModel.from_pretrained(other, str(tmp_path / "adapter"))
    assert bits(other) == before
    injected = mixture(kind)
    inject_adapter_in_model(GemConfig(mask=delta.mask), injected, low_cpu_mem_usage=True)
    assert {p.device.type for n, p in injected.named_parameters() if "gem_" in n} == {"meta"}


def test_a_mask_that_judges_each_expert_is_an_adapters():
    """From selection to a text that is written."""
    model = mixture("qwen3_moe")
    mask = gem_ds.select_mask(model, [batch()], target_modules=["experts"], density="0.02")
    ids = {"input_ids": batch()["input_ids"], "max_new_tokens": 3, "do_sample": False}
    model = wrapped(model, mask)
    losses = train(model, 5)
    assert losses[-1] < losses[0]
    found = model.eval().generate(**ids)
    assert torch.equal(found, model.merge_and_unload().generate(**ids))
