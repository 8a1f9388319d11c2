"""Files of weights that cannot be opened get one sentence; those that can, pass unread."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gem_ds.models.load import open_model
from gem_ds.models.weight_files import refuse_damaged_files, refuse_float8
from tests.tiny_model import make_tiny

WEIGHTS = {"a": torch.arange(4000.0), "b": torch.ones(3, dtype=torch.bfloat16)}


class Harmful:
    """What its pickle would run when it is loaded with trust."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm"),))


def saved(weights: object, *, legacy: bool = False) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        path = folder / "pytorch_model.bin"
        torch.save(weights, path, _use_new_zipfile_serialization=not legacy)

    return write


def cut(start: int, stop: int, *, legacy: bool = False) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        saved(WEIGHTS, legacy=legacy)(folder)
        path = folder / "pytorch_model.bin"
        path.write_bytes(path.read_bytes()[start:stop])

    return write


def pair(folder: Path) -> None:
    """Where there are safetensors, nobody reads the other."""
    save_file(WEIGHTS, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize("write", [saved(WEIGHTS), saved(WEIGHTS, legacy=True), pair])
def test_whole_files_pass(tmp_path, write):
    write(tmp_path)
    refuse_damaged_files(str(tmp_path))
    refuse_float8(str(tmp_path))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda folder: None, "holds no weights"),
        (cut(0, 0), r"\(pytorch_model.bin: EOFError"),
        (cut(0, 9000), r"\(pytorch_model.bin: "),
        (cut(100, 99_999), r"\(pytorch_model.bin: "),
        (cut(0, 9000, legacy=True), r"\(pytorch_model.bin: "),
        (lambda folder: (folder / "pytorch_model.bin").write_text("hello"), "pytorch_model.bin: "),
        (saved([1, 2]), "pytorch_model.bin: it holds no tensors by name"),
        (saved({"a": 1}), "pytorch_model.bin: it holds no tensors by name"),
        (saved({"a": Harmful()}), "pytorch_model.bin: UnpicklingError Weights only load failed"),
    ],
    ids=range(9),
)
def test_others_are_refused_in_one_sentence(tmp_path, monkeypatch, write, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        refuse_damaged_files(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert not Path("harm").exists()


@pytest.mark.parametrize("kind", ["e4m3fn", "e5m2"])
def test_float8_is_not_what_a_model_computes_in(tmp_path, kind):
    """Unless a dtype is given, an evaluation takes that of the files."""
    tiny = make_tiny(tmp_path)
    weights = {"w": torch.ones(8, 8).to(getattr(torch, f"float8_{kind}"))}
    model = tiny.variant("eight", dtype=None)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"are float8, .*: pass --dtype bfloat16\.$"):
        open_model(str(model))
    open_model(str(model), dtype="bfloat16")
    saved(weights)(tiny.folder)
    with pytest.raises(ValueError, match="are float8"):
        refuse_float8(str(tiny.folder))
