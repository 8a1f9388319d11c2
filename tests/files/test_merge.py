"""Merged deltas beside peft's dense formulas, and what the programs tell of deltas."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gem_ds.cli import run
from gem_ds.deltas.diff import overlaps, total
from gem_ds.deltas.merge import merge_deltas
from gem_ds.files.apply import apply_delta
from gem_ds.files.delta import Delta
from gem_ds.files.mask import Mask, WeightInfo
from tests.deltas import make_delta
from tests.tiny import Matrices

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: By dtype, what rounding to it is relative to the largest number.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def base_of(dtype: torch.dtype = torch.float32) -> Matrices:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 5), "b": (4, 9)}
    return Matrices({n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()})


def delta_of(base: nn.Module, seed: int, count: int = 20) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    chosen, delta = {}, None
    for name, parameter in base.named_parameters():
        order = torch.randperm(parameter.numel(), generator=generator)[:count]
        chosen[name] = sorted(order.tolist())
    delta = make_delta(base, chosen)
    noise = {n: torch.randn(v.shape, generator=generator) for n, v in delta.values.items()}
    values = {n: (v.float() * noise[n]).to(v.dtype) for n, v in delta.values.items()}
    return Delta(mask=delta.mask, values=values)


def dense(base: nn.Module, delta: Delta) -> dict[str, Tensor]:
    """The differences from the base, whole, fp64."""
    before = {name: p.detach().double() for name, p in base.named_parameters()}
    with apply_delta(base, delta):
        return {n: p.detach().double() - before[n] for n, p in base.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_it_is_the_dense_formula(dtype, method):
    base = base_of(dtype)
    deltas = [delta_of(base, seed) for seed in (1, 2, 3)]
    weights = [0.5, -0.25, 1.5]
    found = dense(base, merge_deltas(deltas, weights, base, method=method))
    parts = [dense(base, delta) for delta in deltas]
    for name, merged in found.items():
        tensors = [part[name] for part in parts]
        factors = torch.tensor(weights, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a density of 1 prunes nothing
            expected = (
                merge_utils.task_arithmetic(tensors, factors)
                if method == "linear"
                else merge_utils.ties(tensors, factors, 1.0)
            )
        limit = ROUNDING[dtype] * float(expected.abs().max())
        torch.testing.assert_close(merged, expected, rtol=0, atol=limit)


def test_ties_keeps_the_largest_of_each_delta():
    base = base_of()
    deltas = [delta_of(base, seed) for seed in (1, 2)]
    merged = dense(base, merge_deltas(deltas, [1, 1], base, method="ties", density=0.3))
    for name, weight in base.named_parameters():
        tensors = [
            merge_utils.magnitude_based_pruning(dense(base, d)[name], 6.5 / weight.numel())
            for d in deltas  # of 20 entries 0.3 are 6
        ]
        stacked = torch.stack(tensors)
        signs = merge_utils.calculate_majority_sign_mask(stacked)
        torch.testing.assert_close(
            merged[name], merge_utils.disjoint_merge(stacked, signs), rtol=1e-5, atol=1e-6
        )


def test_dare_keeps_by_chance_and_rescales():
    base = Matrices({"a": torch.zeros(100, 100)})
    delta = make_delta(base, {"a.weight": range(10_000)}, values=[1.0] * 10_000)
    first, again, other = (
        merge_deltas([delta], [0.5], base, method="dare_linear", density=0.2, seed=seed)
        for seed in (1, 1, 2)
    )
    values = first.values["a.weight"]
    assert set(values.tolist()) == {0.0, 2.5}
    assert abs(float((values > 0).double().mean()) - 0.2) < 0.02
    assert torch.equal(values, again.values["a.weight"])
    assert not torch.equal(values, other.values["a.weight"])


@given(
    st.sampled_from(DTYPES),
    st.lists(st.tuples(st.floats(width=16), st.floats(width=16)), min_size=1, max_size=30),
)
def test_one_delta_of_weight_one_is_itself(dtype, pairs):
    weight, values = (
        torch.tensor(part).nan_to_num(0.0, 1.0, -1.0) for part in zip(*pairs, strict=True)
    )
    scale = 2.0 ** torch.linspace(-14, 3, len(pairs))
    base = Matrices({"a": (weight[None] * scale).clamp(-6e4, 6e4).to(dtype)})
    delta = make_delta(base, {"a.weight": range(len(pairs))}, values=values.tolist())
    for method in ("linear", "ties", "dare_linear"):
        merged = merge_deltas([delta], [1], base, method=method)  # type: ignore[arg-type]
        assert torch.equal(merged.values["a.weight"], delta.values["a.weight"])
        assert torch.equal(merged.mask.indices["a.weight"], delta.mask.indices["a.weight"])
        assert merged.mask.weights == delta.mask.weights


def test_order_is_nothing_and_a_file_is_an_ordinary_delta(tmp_path):
    base = base_of(torch.bfloat16)
    first, second = delta_of(base, 1), delta_of(base, 2)
    merged = merge_deltas([first, second], [0.3, 0.6], dict(base.named_parameters()))
    turned = merge_deltas([second, first], [0.6, 0.3], base)
    assert all(torch.equal(merged.values[n], turned.values[n]) for n in merged.values)
    merged.save(tmp_path / "merged.safetensors")
    loaded = Delta.load(tmp_path / "merged.safetensors")
    for name in merged.values:
        union = {*first.mask.indices[name].tolist(), *second.mask.indices[name].tolist()}
        assert loaded.mask.indices[name].tolist() == sorted(union)
    with apply_delta(base, loaded):
        pass


def test_what_cannot_be_merged():
    base, other = base_of(), base_of()
    delta = delta_of(base, 1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    head = Delta(mask=delta.mask, values=delta.values, head={"score": torch.zeros(2)})
    cases: list[tuple[str, Any, Any, Any]] = [
        ("made for other base weights", [delta, delta_of(other, 2)], [1, 1], {}),
        ("1 deltas have 2 weights", [delta], [1, 1], {}),
        ("0 deltas", [], [], {}),
        ("not all finite", [delta], [float("nan")], {}),
        ("density is 0", [delta], [1], {"method": "ties", "density": 0}),
        ("linear drops no entries", [delta], [1], {"density": 0.5}),
        ("no method 'slerp'", [delta], [1], {"method": "slerp"}),
        ("has a task head", [head], [1], {}),
        ("NaN or infinity", [delta], [1e300], {}),
    ]
    for words, deltas, weights, more in cases:
        with pytest.raises(ValueError, match=words):
            merge_deltas(deltas, weights, base, **more)


def test_overlaps_are_those_of_sets():
    base = base_of()
    first, second = delta_of(base, 1), delta_of(base, 2)
    found = overlaps(first, second, base)
    moves = [dense(base, delta) for delta in (first, second)]
    for name, overlap in found.items():
        a, b = ({*d.mask.indices[name].tolist()} for d in (first, second))
        assert (overlap.both, overlap.either) == (len(a & b), len(a | b))
        x, y = (move[name].flatten() for move in moves)
        moved = (x != 0) & (y != 0)
        assert overlap.moved == int(moved.sum())
        assert overlap.same_side == int((x[moved] * y[moved] > 0).sum())
        assert overlap.cosine == pytest.approx(float(torch.cosine_similarity(x, y, dim=0)))
    assert total(found).both == sum(part.both for part in found.values())
    assert overlaps(first, first)["a.weight"].jaccard == 1


def test_the_programs_tell_and_write(tmp_path, capsys):
    demo = str(Path(__file__).resolve().parents[2] / "launch/demo/model")
    model = AutoModelForCausalLM.from_pretrained(demo)
    name = "model.layers.1.self_attn.q_proj.weight"
    for file, places in {"a": [1, 2, 3], "b": [2, 3, 9, 11]}.items():
        make_delta(model, {name: places}, demo).save(tmp_path / f"{file}.safetensors")
    a, b, out = (str(tmp_path / f"{file}.safetensors") for file in "abc")
    assert run("delta info", [a]) == 0
    assert "entries   3 of 65,536 (0.0046%) in 1 weights" in capsys.readouterr().out
    plot = tmp_path / "overlap.png"
    assert run("delta diff", [a, b, "--model_name_or_path", demo, "--plot", str(plot)]) == 0
    told = capsys.readouterr().out
    assert "both      2 of 5 entries (40.00%)" in told
    assert "self_attn.q_proj" in told
    assert plot.stat().st_size > 1000
    make_delta(base_of(), {"a.weight": [1]}).save(out)
    assert run("delta diff", [a, out, "--model_name_or_path", demo]) == 1
    assert "entries of 'a.weight', which LlamaForCausalLM does not" in capsys.readouterr().err
    Path(out).unlink()
    merge = [a, b, "--weights", "1", "0.5", "--model_name_or_path", demo, "--output_file", out]
    assert run("delta merge", merge) == 0
    assert Delta.load(out).mask.indices[name].tolist() == [1, 2, 3, 9, 11]
    assert run("delta merge", merge) == 1
    assert "exists: name another" in capsys.readouterr().err
    mask = Mask(
        indices={"x": torch.tensor([1], dtype=torch.int32)},
        weights={"x": WeightInfo.of((2, 2), torch.zeros(1))},
        base_model="tiny",
        settings={},
    )
    mask.save(tmp_path / "mask.safetensors")
    assert run("delta info", [str(tmp_path / "mask.safetensors")]) == 0
    assert "a mask of" in capsys.readouterr().out


def test_the_programs_take_the_base_at_the_revision_of_the_delta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its main branch may have moved since."""

    def refuse(name: str, revision: str) -> None:
        raise ValueError(f"{name} at {revision}")

    monkeypatch.setattr("gem_ds.models.export.refuse_own_adapter", refuse)
    delta = make_delta(base_of(), {"a.weight": [1]}, "owner/base")
    path = str(tmp_path / "a.safetensors")
    replace(delta, mask=replace(delta.mask, revision="v1")).save(path)
    for program, flags in {"delta diff": [], "delta merge": ["--output_file", "merged"]}.items():
        assert run(program, [path, path, "--model_name_or_path", "owner/base", *flags]) == 1
        assert "owner/base at v1" in capsys.readouterr().err
