"""An adapter of entries beside dense masked AdamW: training, lifecycle, files."""

import copy
import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import gem_ds
from gem_ds.files.apply import apply_delta
from gem_ds.files.delta import Delta
from gem_ds.files.mask import Mask
from gem_ds.models.targets import find_targets
from gem_ds.tuner import GemConfig, GemLayer, adapter_to_delta, delta_to_adapter
from tests.deltas import bits, make_delta
from tests.oracle import DenseMaskedAdamW
from tests.tiny import make_model

#: peft asks transformers by a name that it is going to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

ARCHITECTURES = ("llama", "gpt2", "opt")
RATE = 0.05


def mask_of(model: nn.Module, seed: int = 0, share: float = 0.2) -> Mask:
    """Random entries of the targets of a model."""
    return delta_of(model, seed, share).mask


def delta_of(model: nn.Module, seed: int = 0, share: float = 0.2) -> Delta:
    """The same with values that are not the base's."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    names = ["c_attn"] if isinstance(model, GPT2LMHeadModel) else None
    for name in find_targets(model, names):
        size = model.get_parameter(name).numel()
        order = torch.randperm(size, generator=generator)[: max(1, int(share * size))]
        chosen[name] = sorted(order.tolist())
    return make_delta(model, chosen)


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Four sequences of nine tokens, all learnt."""
    tokens = torch.randint(1, 40, (4, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=batch(7)["input_ids"]).logits
    return found


def wrapped(model: PreTrainedModel, mask: Mask, **more: Any) -> Any:
    return get_peft_model(model, GemConfig(mask=mask, task_type="CAUSAL_LM", **more))


def train(model: Any, num_steps: int = 5, first: int = 0) -> list[float]:
    """A loop as anyone writes it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses = []
    for step in range(first, first + num_steps):
        loss = model(**batch(step)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def values_of(model: Any, mask: Mask) -> dict[str, Tensor]:
    """The present values by weight, in the mask's order."""
    modules = {name.removeprefix("base_model.model."): m for name, m in model.named_modules()}
    return {
        name: modules[name.removesuffix(".weight")].gem_entries["default"].values.detach()
        for name in mask.indices
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_is_dense_masked_adamw_and_the_base_stays(architecture: str) -> None:
    dense, model = (make_model(architecture, dropout=0.0) for _ in range(2))
    mask, before, base = mask_of(model), bits(model), logits(model)
    model = wrapped(model, mask)
    assert model.get_nb_trainable_parameters()[0] == mask.num_selected
    assert torch.equal(logits(model), base)

    entries = {name: torch.zeros(dense.get_parameter(name).shape) for name in mask.indices}
    for name, index in mask.indices.items():
        entries[name].view(-1)[index.long()] = 1
    params = {name: dense.get_parameter(name) for name in entries}
    oracle = DenseMaskedAdamW(params, {n: e.bool() for n, e in entries.items()}, max_norm=0.5)
    expected = []
    for step in range(5):
        dense.zero_grad()
        loss = dense(**batch(step)).loss
        loss.backward()
        oracle.step({name: p.grad for name, p in params.items() if p.grad is not None}, RATE)
        expected.append(loss.item())
    torch.testing.assert_close(train(model), expected, rtol=1e-6, atol=1e-6)
    for name, values in values_of(model, mask).items():
        now = params[name].detach().view(-1)[mask.indices[name].long()]
        torch.testing.assert_close(values, now, rtol=1e-5, atol=1e-6)

    trained = logits(model)
    assert not torch.equal(trained, base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    found = {n: v.clone() for n, v in values_of(model, mask).items()}
    fresh = make_model(architecture, dropout=0.0)
    apply_delta(fresh, Delta(mask=mask, values=found))
    assert torch.equal(logits(fresh), trained)
    merged = copy.deepcopy(model).merge_and_unload()
    assert bits(merged) == bits(fresh)
    assert type(merged) is type(dense)
    assert bits(model.unload()) == before
    assert not any(isinstance(module, GemLayer) for module in model.base_model.model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_accumulation_change_no_gradient(reentrant: bool) -> None:
    mask = mask_of(make_model("llama"))
    gradients = []
    for checkpointed in (False, True):
        model = wrapped(make_model("llama"), mask).train()
        if checkpointed:
            model.enable_input_require_grads()
            base = model.base_model.model
            base.activation_checkpointing_enable({"use_reentrant": reentrant})
        for step in range(2):
            model(**batch(step)).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_under_autocast_and_in_bf16_it_is_the_substituted_model() -> None:
    """With W' made whole, and its gradient picked."""
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        model, dense = make_model("llama", dtype), make_model("llama", dtype)
        delta = delta_of(model)
        apply_delta(dense, delta)
        model = wrapped(model, delta.mask)
        for name, values in values_of(model, delta.mask).items():
            assert values.dtype == torch.float32
            values.copy_(delta.values[name])
        for found in (model, dense):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = found(**batch()).loss
            loss.backward()
        assert torch.equal(logits(model), logits(dense))
        modules = dict(model.base_model.model.named_modules())
        for name, index in delta.mask.indices.items():
            whole = dense.get_parameter(name).grad
            assert whole is not None
            layer = modules[name.removesuffix(".weight")]
            gradient = layer.gem_entries["default"].values.grad
            expected = whole.view(-1)[index.long()].float()
            torch.testing.assert_close(gradient, expected, rtol=0.02, atol=2e-3)


def test_adapters_come_and_go() -> None:
    model = make_model("llama")
    first, second, base = delta_of(model, 1), delta_of(model, 2), logits(model)
    expected = []
    for delta in (first, second):
        with apply_delta(model, delta):
            expected.append(logits(model))
    model = wrapped(model, first.mask)
    model.add_adapter("second", GemConfig(mask=second.mask))
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, GemLayer):
            module.gem_entries["default"].values.data.copy_(first.values[f"{name}.weight"])
            module.gem_entries["second"].values.data.copy_(second.values[f"{name}.weight"])
    assert torch.equal(logits(model), expected[0])
    model.set_adapter("second")
    assert torch.equal(logits(model), expected[1])
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), expected[1])
    model.merge_adapter(["second"])
    assert torch.equal(logits(model), expected[1])
    with pytest.raises(ValueError, match="unmerge it before another"):
        model.add_adapter("third", GemConfig(mask=first.mask))
    model.unmerge_adapter()
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="activate one of them"):
        logits(model)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), expected[0])
    assert torch.equal(logits(model.unload()), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_is_loaded_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model("gpt2", dtype, dropout=0.0)
    mask, base = mask_of(model, share=0.5), logits(model)
    model = wrapped(model, mask, modules_to_save=["ln_f"])
    train(model)
    model.save_pretrained(str(tmp_path))
    parts = load_file(tmp_path / "adapter_model.safetensors")
    ours = {name: tensor for name, tensor in parts.items() if "gem_entries" in name}
    assert sum(t.nbytes for t in ours.values()) == 8 * mask.num_selected
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "GEM"
    assert config["method"] == "gem"
    for low in (False, True):
        fresh = make_model("gpt2", dtype, dropout=0.0)
        loaded = PeftModel.from_pretrained(fresh, str(tmp_path), low_cpu_mem_usage=low)
        assert torch.equal(logits(loaded), logits(model))
        with loaded.disable_adapter():
            assert torch.equal(logits(loaded), base)
    continued = PeftModel.from_pretrained(
        make_model("gpt2", dtype, dropout=0.0), str(tmp_path), is_trainable=True
    )
    assert train(continued, 2, first=5) == train(model, 2, first=5)


def test_what_cannot_be_loaded_says_why_and_harms_nothing(tmp_path: Path) -> None:
    model = make_model("llama")
    mask = mask_of(model)
    wrapped(make_model("llama"), mask).save_pretrained(str(tmp_path))
    name = next(iter(mask.indices))

    def other() -> PreTrainedModel:
        changed = make_model("llama")
        changed.get_parameter(name).data.mul_(1.5)
        return changed

    for refused in (
        lambda: wrapped(other(), mask),
        lambda: PeftModel.from_pretrained(other(), str(tmp_path)),
    ):
        with pytest.raises(ValueError, match="has other weights there: load that one"):
            refused()
    before = other()
    kept = bits(before)
    with pytest.raises(ValueError, match="other weights"):
        wrapped(before, mask)
    assert bits(before) == kept
    assert not any(isinstance(module, GemLayer) for module in before.modules())

    with pytest.raises(ValueError, match="pass mask="):
        get_peft_model(model, GemConfig())
    with pytest.raises(ValueError, match=r"does not have"):
        wrapped(make_model("gpt2"), mask)
    tied = make_model("gpt2")
    with pytest.raises(ValueError, match="is tied"):
        wrapped(tied, make_delta(tied, {"lm_head.weight": [1, 2]}).mask)
    shared = make_model("llama")
    shared.model.layers[1].self_attn.q_proj.weight = shared.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(ValueError, match="is tied"):
        wrapped(shared, mask_of(make_model("llama")))
    adapter = tmp_path / "adapter_model.safetensors"
    parts = load_file(adapter)
    save_file({n: t for n, t in parts.items() if not n.endswith("indices")}, adapter)
    with pytest.raises(ValueError, match="is incomplete"):
        PeftModel.from_pretrained(make_model("llama"), str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_delta_and_an_adapter_are_one(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make_model(architecture, dtype)
    delta = delta_of(model)
    delta_to_adapter(delta, tmp_path)
    loaded = PeftModel.from_pretrained(make_model(architecture, dtype), str(tmp_path))
    apply_delta(model, delta)
    assert bits(loaded.merge_and_unload()) == bits(model)
    back = adapter_to_delta(tmp_path)
    assert vars(back.mask).keys() == vars(delta.mask).keys()
    for part in ("weights", "base_model", "revision", "method", "settings", "fingerprints"):
        assert getattr(back.mask, part) == getattr(delta.mask, part)
    for name, values in delta.values.items():
        assert torch.equal(back.values[name], values)
        assert torch.equal(back.mask.indices[name], delta.mask.indices[name])


def test_adapters_of_others_and_heads_are_no_delta(tmp_path: Path) -> None:
    model = make_model("llama")
    delta = delta_of(model)
    head = Delta(mask=delta.mask, values=delta.values, head={"score.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="has a task head"):
        delta_to_adapter(head, tmp_path)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"an adapter of the method .*LORA"):
        adapter_to_delta(tmp_path)


def test_a_mask_may_be_a_file_and_targets_fewer(tmp_path: Path) -> None:
    base = make_model("llama")
    mask_of(base).save(tmp_path / "mask.safetensors")
    config = gem_ds.GemConfig(mask=str(tmp_path / "mask.safetensors"), target_modules=["v_proj"])
    model = get_peft_model(base, config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("v_proj" in name for name in trained)
    with pytest.raises(ValueError, match=re.escape("no linear layer")):
        get_peft_model(make_model("llama"), GemConfig(target_modules=["input_layernorm"]))


def test_blocks_compile_and_the_base_is_back_after_an_error() -> None:
    model = wrapped(make_model("llama"), mask_of(make_model("llama")))
    model.train()
    expected = model(**batch()).loss
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.base_model.model.model.layers[0].compile(backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = model(**batch()).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    found = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found, gradients)

    kept = bits(model)
    with pytest.raises(RuntimeError):  # a product of other sizes, while the values stand there
        model.base_model.model.model.layers[0].self_attn.q_proj(torch.ones(2, 3))
    assert bits(model) == kept


def test_conv1d_is_a_target() -> None:
    model = wrapped(make_model("gpt2"), mask_of(make_model("gpt2")))
    layers = [module for module in model.modules() if isinstance(module, GemLayer)]
    assert layers
    assert all(isinstance(layer.base_layer, Conv1D) for layer in layers)


def test_transformers_adds_saves_and_loads_it_without_a_peft_model(tmp_path: Path) -> None:
    model, base = wrapped(make_model("llama"), mask_of(make_model("llama"))), make_model("llama")
    before = logits(base)
    base.add_adapter(GemConfig(mask=mask_of(base)))
    assert torch.equal(logits(base), before)
    train(model)
    model.save_pretrained(str(tmp_path / "first"))
    loaded = make_model("llama")
    loaded.load_adapter(str(tmp_path / "first"))
    loaded.save_pretrained(str(tmp_path / "second"))
    again = make_model("llama")
    again.load_adapter(str(tmp_path / "second"))
    for found in (loaded, again):
        assert torch.equal(logits(found), logits(model))
        found.disable_adapters()
        assert torch.equal(logits(found), before)
    other = make_model("llama")
    other.model.layers[0].self_attn.q_proj.weight.data.mul_(1.5)
    other.load_adapter(str(tmp_path / "first"))
    with pytest.raises(ValueError, match="other weights there"):
        logits(other)
