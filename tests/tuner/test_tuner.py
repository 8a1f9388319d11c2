"""An adapter of entries beside dense masked AdamW: training, lifecycle, files."""

import copy
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedModel

import gem_ds
from gem_ds import cli
from gem_ds.files.apply import apply_delta
from gem_ds.files.delta import Delta
from gem_ds.files.mask import Mask
from gem_ds.models.targets import find_targets
from gem_ds.tuner import GemConfig, GemLayer, adapter_to_delta, delta_to_adapter
from tests.deltas import bits, bytes_of, make_delta
from tests.oracle import DenseMaskedAdamW, masks_at
from tests.tiny import make_model

ARCHITECTURES = ("llama", "gpt2", "opt")
RATE = 0.05
WEIGHTS = "adapter_model.safetensors"


def mask_of(model: nn.Module, seed: int = 0, share: float = 0.2) -> Mask:
    """Random entries of the targets of a model."""
    return delta_of(model, seed, share).mask


def delta_of(model: nn.Module, seed: int = 0, share: float = 0.2) -> Delta:
    """The same with values that are not the base's."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    names = ["c_attn"] if isinstance(model, GPT2LMHeadModel) else None
    if any(parameter.dim() > 2 for parameter in model.parameters()):
        names = ["all-linear"]  # with experts
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


def train(model: Any, num_steps: int = 5, first: int = 0, rate: float = RATE) -> list[float]:
    """A loop as anyone writes it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    losses = []
    for step in range(first, first + num_steps):
        loss = model(**batch(step)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def entries_of(model: Any, adapter: str = "default") -> dict[str, Any]:
    """An adapter's, by weight."""
    return {
        f"{name.removeprefix('base_model.model.')}.{weight}": entries
        for name, layer in model.named_modules()
        if isinstance(layer, GemLayer)
        for weight, entries in layer.entries_of(adapter).items()
    }


def fill(model: Any, delta: Delta, adapter: str = "default") -> Any:
    """Give an adapter the values of a delta; it begins as the base."""
    for name, entries in entries_of(model, adapter).items():
        entries.values.data.copy_(delta.values[name])
    return model


def values_of(model: Any, mask: Mask) -> dict[str, Tensor]:
    """The present values by weight, in the mask's order."""
    entries = entries_of(model)
    return {name: entries[name].values.detach() for name in mask.indices}


def train_densely(
    dense: PreTrainedModel, mask: Mask, num_steps: int = 5, rate: float = RATE
) -> list[float]:
    """What ``train`` comes to, with all of the weights and dense masked AdamW."""
    params = {name: dense.get_parameter(name) for name in mask.indices}
    optimizer = DenseMaskedAdamW(params, masks_at(params, mask.indices), max_norm=0.5)
    losses = []
    for step in range(num_steps):
        dense.zero_grad()
        loss = dense(**batch(step)).loss
        loss.backward()
        optimizer.step({name: p.grad for name, p in params.items() if p.grad is not None}, rate)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_is_dense_masked_adamw_and_the_base_stays(architecture):
    dense, model = (make_model(architecture, dropout=0.0) for _ in range(2))
    mask, before, base = mask_of(model), bits(model), logits(model)
    model = wrapped(model, mask)
    assert model.get_nb_trainable_parameters()[0] == mask.num_selected
    assert torch.equal(logits(model), base)

    expected = train_densely(dense, mask)
    torch.testing.assert_close(train(model), expected, rtol=1e-6, atol=1e-6)
    for name, values in values_of(model, mask).items():
        now = dense.get_parameter(name).detach().view(-1)[mask.indices[name].long()]
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
def test_checkpointing_and_accumulation_change_no_gradient(reentrant):
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


def test_under_autocast_and_in_bf16_it_is_the_substituted_model():
    """With W' made whole, and its gradient picked."""
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        model, dense = make_model("llama", dtype), make_model("llama", dtype)
        delta = delta_of(model)
        apply_delta(dense, delta)
        model = fill(wrapped(model, delta.mask), delta)
        for found in (model, dense):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = found(**batch()).loss
            loss.backward()
        assert torch.equal(logits(model), logits(dense))
        for name, entries in entries_of(model).items():
            assert entries.values.dtype == torch.float32
            whole = dense.get_parameter(name).grad
            assert whole is not None
            expected = whole.view(-1)[delta.mask.indices[name].long()].float()
            torch.testing.assert_close(entries.values.grad, expected, rtol=0.02, atol=2e-3)


def test_adapters_come_and_go():
    model = make_model("llama")
    first, second, base = delta_of(model, 1), delta_of(model, 2), logits(model)
    expected = []
    for delta in (first, second):
        with apply_delta(model, delta):
            expected.append(logits(model))
    model = fill(wrapped(model, first.mask), first)
    model.add_adapter("second", GemConfig(mask=second.mask))
    fill(model, second, "second")
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
def test_a_saved_adapter_is_loaded_to_the_bit(dtype, tmp_path):
    model = make_model("gpt2", dtype, dropout=0.0)
    mask, base = mask_of(model, share=0.5), logits(model)
    model = wrapped(model, mask, modules_to_save=["ln_f"])
    train(model)
    model.save_pretrained(str(tmp_path))
    parts = load_file(tmp_path / WEIGHTS)
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


def refused(model: PreTrainedModel, action: Callable[[PreTrainedModel], object]) -> str:
    """The one sentence that an action on a model ends with; the model is as it was."""
    kept, modules = bits(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what it says is the caller's matter
        action(model)
    told = str(caught.value)
    assert "\n" not in told
    assert bits(model) == kept
    assert [type(module) for module in model.modules()] == modules
    return told


def test_masks_of_other_models_and_shared_weights_are_refused():
    mask = mask_of(make_model("llama"))
    name = next(iter(mask.indices))
    other = make_model("llama")
    other.get_parameter(name).data.mul_(1.5)
    assert "has other weights there: load" in refused(other, lambda m: wrapped(m, mask))
    elsewhere = make_model("llama")
    elsewhere.model.norm.weight.data.mul_(1.5)
    told = refused(elsewhere, lambda m: wrapped(m, mask))
    assert "has other weights, those of model.norm.weight for one" in told
    wrapped(make_model("llama"), mask)
    assert "pass mask=" in refused(make_model("llama"), lambda m: get_peft_model(m, GemConfig()))
    assert "does not have" in refused(make_model("gpt2"), lambda m: wrapped(m, mask))
    tied = make_delta(make_model("gpt2"), {"lm_head.weight": [1, 2]}).mask
    assert "is tied" in refused(make_model("gpt2"), lambda m: wrapped(m, tied))
    shared = make_model("llama")
    shared.model.layers[1].self_attn.q_proj.weight = shared.model.layers[0].self_attn.q_proj.weight
    assert "is tied" in refused(shared, lambda m: wrapped(m, mask))


#: What may be wrong with a saved adapter -> what is said.
SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (lambda file: os.truncate(file, 300), "is incomplete or damaged"),
    "gone": (lambda file: file.unlink(), "is incomplete or damaged"),
    "no values": (lambda file: rewrite(file, "values", None), "has no values"),
    "no indices": (lambda file: rewrite(file, "indices", None), "has no indices"),
    "fewer": (lambda file: rewrite(file, "values", lambda v: v[1:]), "one finite number for each"),
    "nan": (lambda file: rewrite(file, "values", lambda v: v * torch.nan), "one finite number"),
    "disorder": (lambda file: rewrite(file, "indices", lambda i: i.flip(0)), "ascending order"),
    "elsewhere": (
        lambda file: rewrite(file, "indices", lambda i: torch.arange(len(i), dtype=i.dtype)),
        "other weights there",
    ),
}


def rewrite(file: Path, part: str, change: Callable[[Tensor], Tensor] | None) -> None:
    """Change one tensor of an adapter's file, or take it out."""
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(part))
    tensor = tensors.pop(name)
    save_file(tensors if change is None else tensors | {name: change(tensor)}, file)


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_adapter_is_refused_before_the_model_is_touched(what, tmp_path):
    spoil, told = SPOILT[what]
    model = make_model("llama")
    wrapped(make_model("llama"), mask_of(model)).save_pretrained(str(tmp_path))
    spoil(tmp_path / WEIGHTS)
    assert told in refused(model, lambda m: PeftModel.from_pretrained(m, str(tmp_path)))
    if what == "elsewhere":  # well formed, so a delta is one; who applies it finds the same
        assert adapter_to_delta(tmp_path)
        return
    with pytest.raises(ValueError, match=told):
        adapter_to_delta(tmp_path)
    # A second adapter leaves the first as it is.
    second = wrapped(model, mask_of(model))
    expected = logits(second)
    with pytest.raises(ValueError, match=told):
        second.load_adapter(str(tmp_path), "second")
    assert list(second.peft_config) == ["default"]
    assert torch.equal(logits(second), expected)


def test_another_base_is_refused_by_every_loader(tmp_path):
    adapter = str(tmp_path)
    wrapped(make_model("llama"), mask_of(make_model("llama"))).save_pretrained(adapter)
    name = next(iter(mask_of(make_model("llama")).indices))

    def scaled(name: str) -> PreTrainedModel:
        model = make_model("llama")
        model.get_parameter(name).data.mul_(1.5)
        return model

    def one_entry() -> PreTrainedModel:
        model = make_model("llama")
        index = int(mask_of(model).indices[name][3])
        model.get_parameter(name).data.view(-1)[index] += 1
        return model

    for other in (scaled(name), scaled("model.norm.weight"), scaled("lm_head.weight"), one_entry()):
        told = refused(other, lambda m: PeftModel.from_pretrained(m, adapter))
        assert "other weights" in told
        told = refused(other, lambda m: m.load_adapter(adapter))
        assert "other weights" in told
    for architecture in ("opt", "gpt2"):
        told = refused(make_model(architecture), lambda m: PeftModel.from_pretrained(m, adapter))
        assert "does not have" in told
    model = wrapped(make_model("llama"), mask_of(make_model("llama")))
    model.base_model.model.model.norm.weight.data.mul_(2)
    with pytest.raises(ValueError, match=r"other weights, those of model\.norm\.weight"):
        model.load_adapter(adapter, "second")
    state = load_peft_weights(adapter, device="cpu")
    loaded = wrapped(make_model("llama"), mask_of(make_model("llama")))
    set_peft_model_state_dict(loaded, state)
    moved = wrapped(make_model("llama"), mask_of(make_model("llama"), seed=1))
    with pytest.raises(ValueError, match="are others than those of the adapter default"):
        set_peft_model_state_dict(moved, state)
    with pytest.raises(ValueError, match="is incomplete"):
        set_peft_model_state_dict(loaded, {n: t for n, t in state.items() if ".layers.1." not in n})


def same(one: Delta, other: Delta) -> None:
    """All of two deltas, values to the bit."""
    for part in vars(one.mask).keys() - {"indices"}:
        assert getattr(one.mask, part) == getattr(other.mask, part)
    for tensors in ("values", "head"):
        assert getattr(one, tensors).keys() == getattr(other, tensors).keys()
        for name, tensor in getattr(one, tensors).items():
            assert bytes_of(tensor) == bytes_of(getattr(other, tensors)[name])
    for name, index in one.mask.indices.items():
        assert torch.equal(index, other.mask.indices[name])


def as_adapter(source: Path, folder: Path) -> Path:
    """Run the program that makes an adapter of a delta."""
    words = ["export", "--delta", str(source), "--output_dir", str(folder), "--format", "peft"]
    assert cli.main(words) == 0
    return folder


def as_delta(folder: Path, file: Path) -> Path:
    """Run the program that makes a delta of an adapter."""
    assert cli.main(["import", str(folder), "--output_file", str(file)]) == 0
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_delta_and_an_adapter_are_one(architecture, dtype, tmp_path):
    model = make_model(architecture, dtype, 0.0)
    delta = delta_of(model)
    norm = "model.norm" if architecture == "llama" else "transformer.ln_f"
    parameters = model.get_submodule(norm).named_parameters()
    whole = {f"{norm}.{name}": parameter.detach() + 2 for name, parameter in parameters}
    for i, head in enumerate(({}, whole)):
        delta = Delta(mask=delta.mask, values=delta.values, head=head)
        delta.save(tmp_path / "delta.safetensors")
        adapter = as_adapter(tmp_path / "delta.safetensors", tmp_path / f"peft{i}")
        loaded = PeftModel.from_pretrained(make_model(architecture, dtype, 0.0), str(adapter))
        model = make_model(architecture, dtype, 0.0)
        apply_delta(model, delta)
        assert torch.equal(logits(loaded), logits(model))
        back = as_delta(adapter, tmp_path / f"delta{i}.safetensors")
        same(Delta.load(back), delta)
        again = as_adapter(back, tmp_path / f"again{i}")
        for name in ("adapter_config.json", WEIGHTS):
            assert (again / name).read_bytes() == (adapter / name).read_bytes()
        assert bits(loaded.merge_and_unload()) == bits(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_adapter_is_a_delta_to_the_bits_that_its_model_has(dtype, tmp_path):
    """And of an fp32 base the adapter comes back whole."""
    model = wrapped(make_model("opt", dtype, 0.0), mask_of(make_model("opt", dtype)))
    train(model)
    model.save_pretrained(str(tmp_path / "first"))
    delta = adapter_to_delta(tmp_path / "first")
    delta_to_adapter(delta, tmp_path / "second")
    fresh = make_model("opt", dtype, 0.0)
    apply_delta(fresh, delta)
    again = PeftModel.from_pretrained(make_model("opt", dtype, 0.0), str(tmp_path / "second"))
    assert torch.equal(logits(fresh), logits(model))
    assert torch.equal(logits(again), logits(model))
    files = [load_file(tmp_path / name / WEIGHTS) for name in ("first", "second")]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        rounded = tensor.to(dtype).float() if name.endswith("values") else tensor
        assert torch.equal(rounded, files[1][name])


def test_adapters_of_others_are_no_delta(tmp_path):
    model = make_model("llama")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"an adapter of the method .*LORA"):
        adapter_to_delta(tmp_path)


def test_a_mask_may_be_a_file_and_targets_fewer(tmp_path):
    base = make_model("llama")
    mask_of(base).save(tmp_path / "mask.safetensors")
    config = gem_ds.GemConfig(mask=str(tmp_path / "mask.safetensors"), target_modules=["v_proj"])
    model = get_peft_model(base, config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("v_proj" in name for name in trained)
    with pytest.raises(ValueError, match="pass mask="):
        get_peft_model(make_model("llama"), GemConfig(target_modules=["input_layernorm"]))


def test_blocks_compile_and_the_base_is_back_after_an_error():
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


def test_transformers_adds_saves_and_loads_it_without_a_peft_model(tmp_path):
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
    # Its loader brings no mask, so other entries are found when they are first used.
    rewrite(tmp_path / "first" / WEIGHTS, "indices", lambda i: i.flip(0))
    other = make_model("llama")
    other.load_adapter(str(tmp_path / "first"))
    with pytest.raises(ValueError, match="no entries of such a layer"):
        logits(other)
