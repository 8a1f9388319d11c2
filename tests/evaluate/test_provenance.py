"""Fingerprints: what tells one model from another, and data from other data."""

import hashlib

import pytest
from transformers import LlamaConfig

from gem_ds.evaluate import provenance
from gem_ds.evaluate.provenance import model_fingerprint, sha256_of_files, sha256_of_texts, versions


@pytest.fixture
def folder(tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        (tmp_path / name).write_bytes(name.encode() * 50)
    return tmp_path


def fingerprint(folder) -> str:
    return model_fingerprint(str(folder), LlamaConfig())


def test_a_model_is_told_by_the_content_of_its_files(folder, tmp_path_factory):
    before = fingerprint(folder)
    copy = tmp_path_factory.mktemp("copy")
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert fingerprint(copy) == before
    (folder / "README.md").write_text("else")
    assert fingerprint(folder) == before
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        content = bytearray((folder / name).read_bytes())
        content[77] ^= 1
        (folder / name).write_bytes(content)
        assert fingerprint(folder) != before, name
        content[77] ^= 1
        (folder / name).write_bytes(content)
    assert fingerprint(folder) == before
    (folder / "model.safetensors").rename(folder / "model-2.safetensors")
    assert fingerprint(folder) != before


def test_of_a_large_file_both_ends_and_the_size_count(folder, monkeypatch):
    monkeypatch.setattr(provenance, "_BLOCK", 10)
    monkeypatch.setattr(provenance, "_NUM_BLOCKS", 4)
    weights = folder / "model.safetensors"
    content = bytearray(range(256)) * 4
    weights.write_bytes(content)
    before = fingerprint(folder)
    for position, is_read in ((0, True), (9, True), (100, False), (1023, True)):
        changed = content.copy()
        changed[position] ^= 1
        weights.write_bytes(changed)
        assert (fingerprint(folder) != before) is is_read, position
    weights.write_bytes(content + b"\0")
    assert fingerprint(folder) != before


def test_on_the_hub_a_model_is_told_by_its_commit():
    config = LlamaConfig()
    config._commit_hash = "0a1b"
    assert model_fingerprint("owner/model", config) == "0a1b"


def test_data_are_told_by_their_checksum(folder):
    found = sha256_of_files([folder / "config.json"])
    assert found == {"config.json": hashlib.sha256(b"config.json" * 50).hexdigest()}
    assert sha256_of_texts(["ab", "c"]) != sha256_of_texts(["a", "bc"])
    assert sha256_of_texts(["\ud800"]) != sha256_of_texts(["\ud801"])


def test_versions_name_what_is_installed():
    found = versions()
    assert {"python", "torch", "transformers", "device"} <= found.keys()
    assert all(found.values())
