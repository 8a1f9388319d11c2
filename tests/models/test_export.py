"""The exported folder is base + delta to the bit, and an export that fails leaves nothing."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedModel,
)

from gem_ds import cli
from gem_ds.files.delta import Delta
from tests.deltas import bits, make_delta

CHOSEN = (1, 30, 63)
SCRIPT = Path(cli.__file__).parents[1] / "launch" / "export.py"


def tiny_model(architecture: str) -> PreTrainedModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 24, "num_attention_heads": 2}
    more = {"intermediate_size": 16, "ffn_dim": 16, "word_embed_proj_dim": 8}
    config = AutoConfig.for_model(architecture, **sizes, **more)
    encoder = AutoModelForSequenceClassification
    return (encoder if architecture == "bert" else AutoModelForCausalLM).from_config(config)


def save_run(folder: Path, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> Delta:
    """Writes the base, in fp32, and a delta of three query entries per layer, which it returns."""
    model.save_pretrained(folder / "base")
    ends = ("q_proj.weight", "query.weight")
    chosen = {name: CHOSEN for name, _ in model.named_parameters() if name.endswith(ends)}
    delta = make_delta(model.to(dtype), chosen, values=[-0.0, 0.1, 2.0])
    delta.save(folder / "delta.safetensors")
    return delta


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(folder / "base")),
        *("--delta", str(folder / "delta.safetensors")),
        *("--output_dir", str(folder / "out")),
        *more,
    ]


def refusal(capfd, argv: list[str]) -> str:
    """Runs an export that must fail; returns the one sentence that it prints."""
    assert cli.run("export", argv) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", torch.float32), ("opt", torch.bfloat16), ("bert", torch.float16)],
)
def test_the_folder_is_base_plus_delta_to_the_bit(tmp_path, capfd, architecture, dtype):
    """The base is in fp32; OPT's output layer is tied to the embedding."""
    model = tiny_model(architecture)
    delta = save_run(tmp_path, model, dtype)
    with torch.no_grad():
        for name, values in delta.values.items():
            for flat_index, value in zip(CHOSEN, values, strict=True):
                model.get_parameter(name)[flat_index // 8, flat_index % 8] = value
    capfd.readouterr()
    assert cli.run("export", arguments(tmp_path)) == 0
    assert "\r" not in capfd.readouterr().err, "bars are for terminals"
    exported = type(model).from_pretrained(tmp_path / "out", dtype="auto")
    assert exported.dtype == dtype
    assert bits(exported) == bits(model)
    assert sorted(os.listdir(tmp_path)) == ["base", "delta.safetensors", "out"]
    assert not any("token" in name for name in os.listdir(tmp_path / "out"))  # the base has none


def test_the_tokenizer_goes_along(tmp_path):
    save_run(tmp_path, tiny_model("bert"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    tokenizer.save_pretrained(tmp_path / "base")
    assert cli.run("export", arguments(tmp_path)) == 0
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported("two one three")["input_ids"] == [2, 6, 5, 1, 3]


# Refusals


def test_an_output_folder_in_use_is_kept_unless_told(tmp_path, capfd):
    save_run(tmp_path, tiny_model("llama"))
    out = tmp_path / "out"
    out.write_text("mine")
    assert "is a file" in refusal(capfd, arguments(tmp_path))
    assert out.read_text() == "mine"
    out.unlink()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "--overwrite_output_dir" in refusal(capfd, arguments(tmp_path))
    overwrite = arguments(tmp_path, "--overwrite_output_dir")
    assert "holds no model" in refusal(capfd, overwrite)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "config.json").write_text("{}")
    assert cli.run("export", overwrite) == 0
    assert not (out / "notes.txt").exists()
    AutoModelForCausalLM.from_pretrained(out)
    shutil.rmtree(out)
    out.mkdir()
    assert cli.run("export", arguments(tmp_path)) == 0, "an empty folder is filled"
    deeper = [*arguments(tmp_path)[:-1], str(tmp_path / "a" / "b")]
    assert cli.run("export", deeper) == 0
    assert (tmp_path / "a" / "b" / "config.json").exists()


def test_the_sources_are_never_overwritten(tmp_path, capfd):
    save_run(tmp_path, tiny_model("llama"))
    (tmp_path / "link").symlink_to(tmp_path / "base")
    (tmp_path / "config.json").write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for output_dir in ("base", "base/../base", ".", "link", "delta.safetensors"):
        argv = [*arguments(tmp_path)[:-1], str(tmp_path / output_dir), "--overwrite_output_dir"]
        assert "is or holds" in refusal(capfd, argv)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def other_base(folder: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.q_proj.weight")[7, 7] += 1
    model.save_pretrained(folder / "base")


def incomplete_base(folder: Path) -> None:
    model = tiny_model("llama")
    weights = model.state_dict()
    del weights["model.norm.weight"]
    model.save_pretrained(folder / "base", state_dict=weights)


def nameless_base(folder: Path) -> None:
    config = (folder / "base" / "config.json").read_text()
    (folder / "base" / "config.json").write_text(config.replace("LlamaForCausalLM", "NoSuchModel"))


def base_with_code(folder: Path) -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "base" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_base, "made for other base weights"),
        (lambda folder: os.truncate(folder / "delta.safetensors", 99), "truncated"),
        (lambda folder: (folder / "delta.safetensors").unlink(), "no delta file at"),
        (incomplete_base, "lacks 1 weights of LlamaForCausalLM, for example 'model.norm.weight'"),
        (nameless_base, "names no class of transformers"),
        (base_with_code, "contains custom code"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    tmp_path, capfd, monkeypatch, spoil, message
):
    monkeypatch.setattr("builtins.input", pytest.fail)  # nobody is asked
    save_run(tmp_path, tiny_model("llama"))
    spoil(tmp_path)
    before = sorted(os.listdir(tmp_path))
    assert message in refusal(capfd, arguments(tmp_path))
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_leaves_nothing(tmp_path, capfd, monkeypatch):
    save_run(tmp_path, tiny_model("llama"))

    def full(self, folder, **_):
        (Path(folder) / "model.safetensors").symlink_to("/dev/full")
        (Path(folder) / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert "free space on that disk" in refusal(capfd, arguments(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["base", "delta.safetensors"]


def test_the_script_exits_with_the_status(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert caught.value.code == 1
    assert "no delta file at" in capfd.readouterr().err
