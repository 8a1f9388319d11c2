"""Masks on bases of 4 bits: selected, trained, saved, and written into unquantized ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import gem_ds
from gem_ds import cli
from gem_ds.files.delta import Delta
from gem_ds.files.mask import Mask
from gem_ds.tuner import adapter_to_delta
from tests.deltas import bits
from tests.tiny import make_model
from tests.tuner.test_tuner import GemLayer, batch, logits, refused, train, values_of, wrapped

pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of bitsandbytes, to torch

BF16 = torch.bfloat16


def load(folder: Path, double: bool = True, **more: Any) -> Any:
    """The base in NF4, computing in bf16."""
    from transformers import BitsAndBytesConfig

    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} | more
    config = BitsAndBytesConfig(
        bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=BF16, **options
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=BF16)


def make_base(folder: Path, scale: float = 1.0) -> Path:
    """A model wide enough for bitsandbytes' kernel on CPUs, in bf16; one weight may be scaled."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "head_dim": 32}
    model = make_model("llama", BF16, **sizes)
    model.model.layers[0].self_attn.q_proj.weight.data.mul_(scale)
    model.save_pretrained(folder)
    return folder


def select(model: Any, keep_zeros: bool | None = None) -> Mask:
    batches = [batch(1), batch(2)]
    return gem_ds.select_mask(model, batches, density="0.05", keep_zeros=keep_zeros)


def packed(model: Any) -> dict[str, bytes]:
    """The bytes of the base's parameters, by their own names; of 4 bits as they are saved."""
    model.state_dict()  # by which bitsandbytes lays back what it has laid out for its CPU kernel
    return {
        name.replace(".base_layer.", "."): value
        for name, value in bits(model).items()
        if ".gem_entries." not in name
    }


def trained_weights(model: Any) -> dict[str, Tensor]:
    """What the layers of an adapter compute with."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, GemLayer):
            entries = layer.gem_entries["default"]
            base = layer.weights["weight"]
            with base.substituted(entries.indices, entries.values, BF16) as weight:
                found[f"{name}.weight"] = weight.detach().clone()
    return found


@pytest.mark.parametrize("double", [False, True])
def test_a_mask_of_four_bits_from_selection_to_an_exported_model(double, tmp_path):
    base = make_base(tmp_path / "base")
    # Layers that are no targets run by a kernel of bitsandbytes, which rounds otherwise.
    others = ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    model = load(base, double, llm_int8_skip_modules=others)
    dense = load(base, double, llm_int8_skip_modules=others).dequantize()
    before = packed(model)
    assert {p.dtype for p in dense.parameters()} == {BF16}

    mask, expected = select(model), select(dense, keep_zeros=False)
    assert "keep_zeros" not in mask.settings, "a code of 4 bits is 0, and nothing was pruned"
    assert packed(model) == before
    assert mask.num_selected == expected.num_selected
    assert mask.weights == expected.weights
    for name, index in mask.indices.items():
        assert torch.equal(index, expected.indices[name])
    assert mask.settings["base_quantization"]["quant_method"] == "bitsandbytes"

    model, plain = wrapped(model, mask), wrapped(dense, expected)
    assert train(model) == train(plain)
    assert packed(model.base_model.model) == before
    model.save_pretrained(str(tmp_path / "adapter"))

    model = PeftModel.from_pretrained(
        load(base, double), str(tmp_path / "adapter"), is_trainable=True
    )
    train(model, first=5)
    quantized = load(base, double).dequantize()
    for name, weight in trained_weights(model).items():
        moved = (weight != quantized.get_parameter(name)).view(-1).nonzero()[:, 0]
        assert moved.numel()
        assert set(moved.tolist()) <= set(mask.indices[name].tolist())

    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(load(base, double), str(tmp_path / "adapter"))
    trained = logits(loaded)
    assert torch.equal(trained, logits(model.eval()))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(load(base, double)))
    with pytest.raises(ValueError, match="cannot hold the values"):
        loaded.merge_and_unload()

    export = ["export", "--delta", str(tmp_path / "adapter"), "--model_name_or_path", str(base)]
    as_trained, on_disk, delta = (str(tmp_path / name) for name in ("q", "b", "delta"))
    assert cli.main([*export, "--output_dir", as_trained, "--dequantize"]) == 0
    exported = AutoModelForCausalLM.from_pretrained(as_trained)
    assert exported.dtype == BF16
    # In eval mode bitsandbytes turns to a kernel of its own on CPUs; so the training computed:
    again = PeftModel.from_pretrained(load(base, double), str(tmp_path / "adapter")).train()
    torch.testing.assert_close(logits(exported), logits(again), rtol=2**-7, atol=2**-7)
    assert cli.main([*export, "--output_dir", on_disk]) == 0
    changed = AutoModelForCausalLM.from_pretrained(on_disk)
    values = values_of(model, mask)
    original = AutoModelForCausalLM.from_pretrained(base)
    for name, parameter in original.named_parameters():
        now = parameter.detach().clone()
        if name in mask.indices:
            index = mask.indices[name].long()
            seen = quantized.get_parameter(name).detach().view(-1)[index].float()
            flat = now.view(-1)
            flat[index] = (flat[index].float() + (values[name] - seen)).to(BF16)
        assert torch.equal(changed.get_parameter(name), now)
    words = [str(tmp_path / "adapter"), "--model_name_or_path", str(base)]
    assert cli.main(["import", *words, "--output_file", delta]) == 0
    gem_ds.apply_delta(original, Delta.load(delta))
    assert bits(original) == bits(changed)


def test_another_quantization_is_refused_and_masks_go_anywhere(tmp_path):
    base, adapter = make_base(tmp_path / "base"), str(tmp_path / "adapter")
    mask = select(load(base))
    wrapped(load(base), mask).save_pretrained(adapter)
    for other in (
        load(base, bnb_4bit_quant_type="fp4"),
        load(base, double=False),
        load(base, load_in_4bit=False, load_in_8bit=True),
        AutoModelForCausalLM.from_pretrained(base),
    ):
        told = refused(other, lambda m: PeftModel.from_pretrained(m, adapter))
        assert "trained on a base quantized by" in told
        told = refused(other, lambda m: m.load_adapter(adapter))
        assert "trained on a base quantized by" in told
    assert "this one is by nothing" in told
    told = refused(
        load(make_base(tmp_path / "other", 1.5)), lambda m: PeftModel.from_pretrained(m, adapter)
    )
    assert "other weights there" in told
    with pytest.raises(ValueError, match="was quantized"):
        adapter_to_delta(adapter)
    words = ["export", "--delta", adapter, "--output_dir", str(tmp_path / "out")]
    assert cli.main([*words, "--model_name_or_path", str(tmp_path / "other")]) == 1
    assert cli.main([*words, "--dequantize", "--format", "peft"]) == 1
    # What a mask was selected on does not bind who trains it elsewhere.
    train(wrapped(AutoModelForCausalLM.from_pretrained(base), mask), 1)
    train(wrapped(load(base), select(AutoModelForCausalLM.from_pretrained(base))), 1)
    eight = load(base, load_in_4bit=False, load_in_8bit=True)
    train(wrapped(eight, select(eight)), 1)
