"""Tensors and metadata come back as they were, and a bad file is refused in one sentence."""

import json
import os
import stat

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from gem_ds.files import digests
from gem_ds.files.tensors import FORMAT_VERSION, load_tensors, save_tensors
from tests.deltas import bytes_of

KIND = "gem_mask"
METADATA = {"count": 3, "rate": 0.1, "name": None, "nested": {"shape": [2, 3]}, "text": "ä\n"}


# Round trips


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64)
CONTENT = st.tuples(st.sampled_from(DTYPES), st.binary(max_size=72).map(lambda b: b[len(b) % 8 :]))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
FIELDS = st.text().filter(lambda name: name not in ("kind", "format_version"))


@settings(deadline=None, max_examples=60)
@given(
    content=st.dictionaries(st.text(min_size=1, max_size=8), CONTENT, max_size=4),
    metadata=st.dictionaries(FIELDS, SCALARS | st.lists(SCALARS), max_size=3),
)
def test_any_tensors_and_metadata_come_back_bit_for_bit(tmp_path_factory, content, metadata):
    """From the file that safetensors itself would write."""
    tensors = {
        name: torch.tensor(list(raw), dtype=torch.uint8).view(dtype)
        for name, (dtype, raw) in content.items()
    }
    path = tmp_path_factory.mktemp("files") / "f.safetensors"
    save_tensors(path, tensors, metadata, kind=KIND)
    loaded, found = load_tensors(path, KIND)
    assert found == metadata
    assert {n: (t.dtype, bytes_of(t)) for n, t in loaded.items()} == content
    with safe_open(path, framework="pt") as file:
        assert path.read_bytes() == save(tensors, metadata=file.metadata())


def test_a_file_is_written_from_the_tensors_own_memory():
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    own = digests.bytes_of(torch.from_numpy(numbers))
    assert np.frombuffer(own, np.uint8).ctypes.data == numbers.ctypes.data


@pytest.mark.parametrize("place", [np.s_[1:2, 1:2], np.s_[:, 1], np.s_[1, 2:], np.s_[:0]])
def test_the_bytes_of_a_part_are_those_of_its_numbers(place):
    """Of one element too, with the strides of what it lies in, and of none."""
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert bytes(digests.bytes_of(torch.from_numpy(numbers)[place])) == numbers[place].tobytes()


def test_the_file_is_ordinary_safetensors_that_others_can_read(tmp_path):
    path = tmp_path / "f.safetensors"
    matrix = torch.arange(6.0).reshape(2, 3)
    umask = os.umask(0o022)
    try:
        save_tensors(path, {"a": matrix.t(), "b": matrix[0], "c": matrix[0]}, METADATA, kind=KIND)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    loaded = load_file(path)
    assert torch.equal(loaded["a"], matrix.t())
    assert torch.equal(loaded["b"], torch.tensor([0.0, 1.0, 2.0]))
    assert torch.equal(loaded["c"], loaded["b"])


# Reading refuses what is not a whole file of the kind


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "f.safetensors"
    save_tensors(path, {"a": torch.arange(50), "b": torch.ones(7)}, METADATA, kind=KIND)
    good_bytes = path.read_bytes()
    for length in (*range(0, len(good_bytes), 9), len(good_bytes) - 1):
        path.write_bytes(good_bytes[:length])
        with pytest.raises(ValueError, match=f"{path} .* truncated"):
            load_tensors(path, KIND)


@settings(deadline=None, max_examples=80)
@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("noise") / "f.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a whole safetensors file|without GEM"):
        load_tensors(path, KIND)


def header(**fields: object) -> dict[str, str]:
    return {"gem": json.dumps(fields)}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "without GEM metadata"),
        ({"format": "pt"}, "without GEM metadata"),
        ({"gem": "{"}, "damaged GEM metadata"),
        ({"gem": "[1]"}, "damaged GEM metadata"),
        ({"gem": "[" * 100_000}, "damaged GEM metadata"),
        (header(format_version=1), "is of kind None, not 'gem_mask'"),
        (header(kind="gem_delta", format_version=1), "is of kind 'gem_delta', not 'gem_mask'"),
        (header(kind=KIND), "no valid format version"),
        (header(kind=KIND, format_version="1"), "no valid format version"),
        (header(kind=KIND, format_version=0), "no valid format version"),
        (header(kind=KIND, format_version=FORMAT_VERSION + 1), "upgrade gem_ds"),
    ],
)
def test_other_safetensors_files_are_refused(tmp_path, metadata, message):
    path = tmp_path / "f.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=f"{path} .*{message}"):
        load_tensors(path, KIND)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no mask file at"):
        load_tensors(tmp_path / "f.safetensors", KIND)
    with pytest.raises(ValueError, match="is a folder: pass the mask file in it"):
        load_tensors(tmp_path, KIND)
