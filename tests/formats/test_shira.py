"""A delta as an adapter of SHiRA and back, with peft's own merging as the oracle."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from gem_ds import cli
from gem_ds.files.apply import apply_delta
from gem_ds.files.delta import Delta
from gem_ds.files.fingerprint import fingerprint
from gem_ds.files.mask import Mask, WeightInfo
from gem_ds.formats.shira import _differences, _merged
from tests.deltas import bits, make_delta
from tests.largest_tensor import LargestTensor
from tests.tiny import bits as bits_of
from tests.tiny import make_model

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WORDS = {2: torch.int16, 4: torch.int32}

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


@settings(deadline=None, max_examples=60)
@example(torch.bfloat16, 0, 1.0)
@given(st.sampled_from(DTYPES), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 1.0]))
def test_differences_give_any_values_to_the_bit(dtype, seed, near):
    """Any finite bits, some near the base's; added by torch, dense + sparse."""
    generator = torch.Generator().manual_seed(seed)
    word = WORDS[dtype.itemsize]
    low, high = torch.iinfo(word).min, torch.iinfo(word).max
    both = torch.randint(low, high, (2, 8, 16), generator=generator).to(word).view(dtype)
    both = both.where(both.isfinite(), 0)
    both[1] = both[1].where(torch.rand(8, 16, generator=generator) >= near, both[0] * 1.01)
    both = both.where(both.isfinite(), -0.0)
    if dtype == torch.float32:  # it has no number that rounds to -0.0
        both = both.where(both != 0, 0.0)
    base, trained = both
    indices = torch.randperm(128, generator=generator)[:50].sort().values.int()
    values = trained.view(-1)[indices.long()]
    flat, d = _differences(values, base, indices)
    merged = base.clone()
    merged += torch.sparse_coo_tensor(torch.stack([flat // 16, flat % 16]).int(), d, (8, 16))
    expected = base.clone()
    expected.view(-1)[indices.long()] = values
    assert torch.equal(bits_of(merged), bits_of(expected))
    order = torch.randperm(len(flat), generator=generator)  # a file need not be sorted
    if len(flat.unique()) == len(flat):
        flat, d = flat[order], d[order]
    index, before, found = _merged(flat, d, base)
    assert torch.equal(index, indices)
    assert torch.equal(bits_of(before), bits_of(base.view(-1)[indices.long()]))
    assert torch.equal(bits_of(found), bits_of(values))


def model_of(dtype: torch.dtype) -> PreTrainedModel:
    return make_model("llama").to(dtype)


def saved_delta(folder: Path, dtype: torch.dtype, seed: int = 0) -> Delta:
    """With the base beside it; some weights have hardly an entry."""
    model = model_of(dtype)
    model.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        full = f"model.layers.1.{name}.weight"
        order = torch.randperm(model.get_parameter(full).numel(), generator=generator)
        chosen[full] = sorted(order[: 40 if "q_proj" in name else 1].tolist())
    delta = make_delta(model, chosen, base_model=str(folder / "base"))
    delta.save(folder / "delta.safetensors")
    return delta


def run(program: str, folder: Path, *more: str) -> int:
    words = {
        "export": ["--delta", f"{folder}/delta.safetensors", "--output_dir", f"{folder}/shira"],
        "import": [f"{folder}/shira", "--output_file", f"{folder}/back.safetensors"],
    }
    more = ("--format", "shira", *more) if program == "export" else more
    return cli.run(program, [*words[program], *more])


@pytest.mark.parametrize("dtype", DTYPES)
def test_peft_merges_it_to_the_bit_and_it_comes_back(tmp_path, dtype):
    delta, trained = saved_delta(tmp_path, dtype), model_of(dtype)
    apply_delta(trained, delta)
    assert run("export", tmp_path) == 0
    adapted: Any = PeftModel.from_pretrained(model_of(dtype), str(tmp_path / "shira"))
    assert bits(adapted.merge_and_unload()) == bits(trained)
    assert run("import", tmp_path) == 0
    back = Delta.load(tmp_path / "back.safetensors")
    assert back.mask.weights == delta.mask.weights
    for name, values in delta.values.items():
        assert torch.equal(back.mask.indices[name], delta.mask.indices[name])
        assert torch.equal(bits_of(back.values[name]), bits_of(values))
    apply_delta(model_of(dtype), back)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_of_peft_is_a_delta(tmp_path, capfd, dtype):
    model = model_of(dtype)
    model.save_pretrained(tmp_path / "base")
    adapted: Any = get_peft_model(
        model, ShiraConfig(r=1, target_modules=["q_proj", "up_proj"], init_weights=False)
    )
    adapted.save_pretrained(tmp_path / "shira")
    assert run("import", tmp_path) == 1
    assert "pass --model_name_or_path" in capfd.readouterr().err
    assert run("import", tmp_path, "--model_name_or_path", str(tmp_path / "base")) == 0
    found = model_of(dtype)
    with apply_delta(found, Delta.load(tmp_path / "back.safetensors")):
        assert bits(found) == bits(adapted.merge_and_unload())
    assert bits(found) == bits(model_of(dtype))


def change(path: Path, part: str, make: Callable[[Tensor], Tensor]) -> None:
    """Rewrites a file with other tensors where their names end so."""
    tensors = load_file(path)
    changed = {n: make(t).contiguous() if n.endswith(part) else t for n, t in tensors.items()}
    assert any(changed[name] is not tensor for name, tensor in tensors.items())
    save_file(changed, path, {"format": "pt"})


def of_adapter(part: str, make: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return lambda folder: change(folder / "shira" / "adapter_model.safetensors", part, make)


def cut(folder: Path) -> None:
    path = folder / "shira" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def other_base(folder: Path) -> None:
    change(folder / "base" / "model.safetensors", "q_proj.weight", lambda weight: weight[:2])


REFUSED = {
    "cut": (cut, "incomplete|not fully covered|truncated|Error while deserializing"),
    "nan": (of_adapter("shira_weight", lambda d: d * torch.nan), "NaN or infinity"),
    "below": (of_adapter("indices", lambda i: i - 99), "negative indices"),
    "beyond": (of_adapter("indices", lambda i: i + 99), "lie outside of its shape"),
    "flat": (of_adapter("indices", lambda i: i[0]), "adapter is damaged or another's"),
    "other base": (other_base, "outside of its shape|does not have|damaged or another's"),
    "no adapter": (lambda f: (f / "shira/adapter_config.json").write_text("[]"), "no adapter's"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_delta_is_refused_in_a_sentence(tmp_path, capfd, name):
    saved_delta(tmp_path, torch.float32)
    assert run("export", tmp_path) == 0
    spoil, message = REFUSED[name]
    spoil(tmp_path)
    capfd.readouterr()
    assert run("import", tmp_path) == 1
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1
    assert re.search(message, told[0])
    assert not (tmp_path / "back.safetensors").exists()


def test_an_export_that_does_not_fit_leaves_nothing(tmp_path, capfd):
    saved_delta(tmp_path, torch.float32)
    change(tmp_path / "base" / "model.safetensors", "norm.weight", lambda weight: weight + 1)
    assert run("export", tmp_path) == 1
    assert "made for other base weights" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta.safetensors"]


def test_a_weight_of_more_than_2_to_the_31_entries(tmp_path):
    """A file of 4.3 GB that is a hole; what is not used is not read."""
    name, rows, columns = "model.layers.0.mlp.up_proj.weight", 65536, 32769
    header = {
        name: {"dtype": "F16", "shape": [rows, columns], "data_offsets": [0, 2 * rows * columns]}
    }
    text = json.dumps(header).encode()
    (tmp_path / "base").mkdir()
    with (tmp_path / "base" / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * rows * columns)
    places = [(0, 0), (65535, 32767), (65535, 32768)]
    flat = [row * columns + column for row, column in places]
    assert flat[-1] == rows * columns - 1 > 2**31
    nothing = torch.zeros(3, dtype=torch.float16)
    mask = Mask(
        indices={name: torch.tensor(flat)},
        weights={name: WeightInfo.of((rows, columns), nothing)},
        base_model=str(tmp_path / "base"),
        settings={},
        fingerprints={name: fingerprint((rows, columns), torch.zeros(1024, dtype=torch.float16))},
    )
    values = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float16)
    Delta(mask=mask, values={name: values}).save(tmp_path / "delta.safetensors")
    with LargestTensor() as made:
        assert run("export", tmp_path) == 0
        assert run("import", tmp_path) == 0
    assert made.num_entries <= 2 * (rows + columns), "the adapter's own, of r = 1"
    written = load_file(tmp_path / "shira" / "adapter_model.safetensors")
    indices = next(tensor for key, tensor in written.items() if key.endswith("indices"))
    assert indices[:, :3].T.tolist() == [list(place) for place in places]
    back = Delta.load(tmp_path / "back.safetensors")
    assert back.mask.indices[name].tolist() == flat
    assert torch.equal(bits_of(back.values[name]), bits_of(values))
