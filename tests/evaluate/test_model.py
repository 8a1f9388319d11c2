"""The model under evaluation: flags that cannot be, and what tells one model from another."""

import pytest
from transformers import LlamaConfig

from gem_ds.evaluate import model
from gem_ds.evaluate.evaluator import sha256_of_texts
from gem_ds.evaluate.model import SamplingArguments, check_arguments, model_fingerprint
from tests.tiny import DS_CONFIGS
from tests.tiny_evaluation import REFUSED, refusal


@pytest.mark.parametrize(("changes", "message"), REFUSED["model_arguments"])
def test_flags_that_cannot_be_are_refused(tmp_path, changes, message):
    options = {"model_name_or_path": "m", "output_dir": str(tmp_path)} | changes
    given = {"{zero3}": str(DS_CONFIGS / "zero3.json"), "{file}": __file__}
    arguments = {name: given.get(value, value) for name, value in options.items()}
    assert message in refusal(check_arguments, SamplingArguments(**arguments))


@pytest.fixture
def folder(tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        (tmp_path / name).write_bytes(name.encode() * 50)
    return tmp_path


def fingerprint(folder) -> str:
    return model_fingerprint(str(folder), LlamaConfig())


def test_a_model_is_told_by_the_content_and_the_names_of_its_files(folder, tmp_path_factory):
    before = fingerprint(folder)
    copy = tmp_path_factory.mktemp("copy")
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert fingerprint(copy) == before
    (folder / "README.md").write_text("else")
    assert fingerprint(folder) == before
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:77] + b"\0" + content[78:])
        assert fingerprint(folder) != before, name
        (folder / name).write_bytes(content)
    assert fingerprint(folder) == before
    (folder / "model.safetensors").rename(folder / "model-2.safetensors")
    assert fingerprint(folder) != before


def test_of_a_large_file_both_ends_and_the_size_count(folder, monkeypatch):
    monkeypatch.setattr(model, "_BLOCK", 10)
    monkeypatch.setattr(model, "_NUM_BLOCKS", 4)
    weights = folder / "model.safetensors"
    content = bytes(range(256)) * 4
    weights.write_bytes(content)
    before = fingerprint(folder)
    for position, is_read in ((0, True), (9, True), (100, False), (1023, True)):
        weights.write_bytes(content[:position] + b"?" + content[position + 1 :])
        assert (fingerprint(folder) != before) is is_read, position
    weights.write_bytes(content + b"\0")
    assert fingerprint(folder) != before


def test_on_the_hub_a_model_is_told_by_its_commit():
    config = LlamaConfig()
    config._commit_hash = "0a1b"
    assert model_fingerprint("owner/model", config) == "0a1b"


def test_texts_are_told_by_their_borders_and_surrogates():
    assert sha256_of_texts(["ab", "c"]) != sha256_of_texts(["a", "bc"])
    assert sha256_of_texts(["\ud800"]) != sha256_of_texts(["\ud801"])
