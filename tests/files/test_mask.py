"""A mask file comes back as it was, and every invalid one is refused by the name of its weight."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.files.digests import checksum
from gem_ds.files.mask import MASK_KIND, Mask, WeightInfo, pack_mask
from gem_ds.files.tensors import save_tensors
from gem_ds.select.shards import index_dtype

SETTINGS = {"density": 0.001, "seed": 3, "targets": ["q", "v"], "calibration_examples": None}


def int32(*indices: int) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.int32)


def make_mask(**changes: object) -> Mask:
    """A mask of two weights, "b" before "a", of a bf16 base whose weights are 0, 1, 2, ..."""
    indices = {"b": int32(0, 5, 11), "a": int32()}
    shapes = {"b": (3, 4), "a": (2, 2)}
    weights = {n: WeightInfo.of(shapes[n], index.bfloat16()) for n, index in indices.items()}
    fields = {"indices": indices, "weights": weights, "base_model": "owner/base"}
    return Mask(**{**fields, "revision": "abc", "settings": SETTINGS, **changes})


def assert_same(left: Mask, right: Mask) -> None:
    assert list(left.weights.items()) == list(right.weights.items())  # in this order
    assert list(left.indices) == list(right.indices)
    for name, indices in left.indices.items():
        assert right.indices[name].dtype == indices.dtype
        assert torch.equal(right.indices[name], indices)
    for field in ("base_model", "revision", "method", "settings"):
        assert getattr(left, field) == getattr(right, field)


# Round trips


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_any_mask_comes_back_from_its_file(tmp_path_factory, data):
    indices, weights = {}, {}
    names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=10)
    for name in data.draw(st.lists(names, unique=True, min_size=1, max_size=4)):
        shape = tuple(data.draw(st.lists(st.integers(1, 2**17), min_size=1, max_size=3)))
        numel = torch.Size(shape).numel()
        chosen = sorted(data.draw(st.sets(st.integers(0, numel - 1), max_size=20)))
        indices[name] = torch.tensor(chosen, dtype=index_dtype(numel))
        dtype = data.draw(st.sampled_from(["float32", "bfloat16", "float16"]))
        weights[name] = WeightInfo(shape=shape, dtype=dtype, checksum=data.draw(st.text()))
    mask = make_mask(indices=indices, weights=weights, revision=None)
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    mask.save(path)
    assert_same(Mask.load(path), mask)


def test_indices_are_int64_exactly_where_int32_would_not_do(tmp_path):
    assert index_dtype(2**31 - 1) == torch.int32
    assert index_dtype(2**31) == torch.int64
    huge = WeightInfo(shape=(2**16, 2**16), dtype="bfloat16", checksum="")
    mask = make_mask(indices={"a": torch.tensor([0, 2**31 + 5, 2**32 - 1])}, weights={"a": huge})
    mask.save(tmp_path / "mask.safetensors")
    assert_same(Mask.load(tmp_path / "mask.safetensors"), mask)
    with pytest.raises(ValueError, match=r"'a' are 1-dimensional int32 instead of .* int64"):
        make_mask(indices={"a": int32(1)}, weights={"a": huge})


# Checksums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_checksum_is_sha256_of_the_bytes(dtype):
    raw = torch.randint(256, (32,), dtype=torch.uint8)
    values = raw.view(dtype)
    assert checksum(values) == hashlib.sha256(bytes(raw.tolist())).hexdigest()
    strided = torch.stack([values, values], dim=1)
    assert checksum(strided[:, 0]) == checksum(values)
    assert checksum(strided[:1, 0]) == checksum(values[:1])
    assert checksum(values[:0]) == hashlib.sha256(b"").hexdigest()
    assert checksum(torch.tensor([-0.0], dtype=dtype)) != checksum(torch.tensor([0.0], dtype=dtype))


# Invalid masks


@settings(deadline=None, max_examples=200)
@given(chosen=st.lists(st.integers(-2, 7), max_size=6))
def test_exactly_ascending_indices_in_range_are_accepted(chosen):
    valid = chosen == sorted(set(chosen)) and set(chosen) <= set(range(6))
    weights = {"w": WeightInfo(shape=(2, 3), dtype="float32", checksum="")}
    if valid:
        make_mask(indices={"w": int32(*chosen)}, weights=weights)
    else:
        with pytest.raises(ValueError, match="'w'"):
            make_mask(indices={"w": int32(*chosen)}, weights=weights)


DAMAGES = {
    "hold duplicates": {"b.indices": int32(0, 5, 5)},
    "not in ascending order": {"b.indices": int32(5, 0, 11)},
    "index 12 of 'b' is out of range": {"b.indices": int32(0, 5, 12)},
    "index -1 of 'b' is out of range": {"b.indices": int32(-1, 5, 11)},
    "'b' are 1-dimensional int64 instead of": {"b.indices": torch.tensor([0, 5, 11])},
    "'b' are 1-dimensional float32 instead": {"b.indices": torch.tensor([0.0, 5.0, 11.0])},
    "'b' are 2-dimensional int32 instead of": {"b.indices": int32(0, 5).reshape(1, 2)},
    "'b' has no indices": {"b.indices": None},
    "'c.indices', which its metadata does not describe": {"c.indices": int32(0)},
}


def refuse(path: Path, tensors: dict[str, Any], metadata: dict[str, Any], message: str) -> None:
    save_tensors(path, tensors, metadata, kind=MASK_KIND)
    with pytest.raises(ValueError, match=message) as caught:
        Mask.load(path)
    assert str(caught.value).startswith(f"{path} cannot be used: ")
    assert "make the mask again" in str(caught.value)


@pytest.mark.parametrize("message", DAMAGES)
def test_a_file_with_bad_tensors_is_refused(tmp_path, message):
    tensors, metadata = pack_mask(make_mask())
    changed = {**tensors, **DAMAGES[message]}
    whole = {name: tensor for name, tensor in changed.items() if tensor is not None}
    refuse(tmp_path / "mask.safetensors", whole, metadata, message)


BF16 = {"shape": [3, 4], "dtype": "bfloat16", "checksum": ""}


#: What one of its two weights is said to be, or other fields, and words of the sentence.
BAD_METADATA = [
    ({"weights": None}, "'weights' is missing"),
    ({"weights": {}}, "no weights"),
    ({"base_model": 3}, "'base_model' is missing or has a wrong type"),
    ({"settings": []}, "'settings'"),
    *(
        ({"weights": {"b": described}}, message)
        for described, message in (
            (3, "'b' is missing or has a wrong type"),
            ({"shape": [3, 4], "dtype": "bfloat16"}, "'checksum' is missing"),
            (BF16 | {"shape": 12}, "'shape'"),
            *((BF16 | {"shape": shape}, "impossible shape") for shape in ([0], ["3"], [])),
            *((BF16 | {"dtype": dtype}, f"dtype '{dtype}'") for dtype in ("int8", "nn")),
        )
    ),
]


@pytest.mark.parametrize(("changed", "message"), BAD_METADATA)
def test_a_file_with_bad_metadata_is_refused(tmp_path, changed, message):
    tensors, metadata = pack_mask(make_mask())
    del tensors["a.indices"], metadata["weights"]["a"]
    refuse(tmp_path / "mask.safetensors", tensors, metadata | changed, message)


def test_indices_without_a_description_and_the_reverse_are_refused():
    mask = make_mask()
    with pytest.raises(ValueError, match="'a' is described but has no indices"):
        replace(mask, indices={"b": mask.indices["b"]})
    with pytest.raises(ValueError, match="'a' has indices but is not described"):
        replace(mask, weights={"b": mask.weights["b"]})


# Another model


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": (2, 2)}, r"'b', which tiny does not have: .* owner/base"),
        ({"a": (2, 2), "b": (4, 3)}, r"'b' of shape \(3, 4\), and tiny .* \(4, 3\): .* owner/base"),
        ({"a": (2, 2), "b": (0,)}, r"shape \(0,\)"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(shapes, message):
    make_mask().check_model({"other": (9,), "a": (2, 2), "b": torch.Size([3, 4])}, "tiny")
    with pytest.raises(ValueError, match=message):
        make_mask().check_model(shapes, "tiny")


def test_other_base_weights_are_refused_and_other_dtypes_left_out():
    mask = make_mask()
    values = {name: indices.bfloat16() for name, indices in mask.indices.items()}
    mask.check_base(values)
    sentence = r"1 of 2 .* first is 'b'\): use owner/base at revision abc"
    with pytest.raises(ValueError, match=sentence):
        mask.check_base({**values, "b": values["b"] + 1})
    mask.check_base({**values, "b": values["b"].float() + 1})
