"""The exported folder is base + delta to the bit, and an export that fails leaves nothing."""

import json
import os
import re
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from gem_ds import cli
from gem_ds.files import manifest
from gem_ds.files.delta import Delta
from gem_ds.formats import export
from gem_ds.models import folder
from gem_ds.models.export import prepare_folder
from tests.deltas import as_older, bits, make_delta

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


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", torch.float32), ("opt", torch.bfloat16), ("bert", torch.float16)],
)
def test_the_folder_is_base_plus_delta_to_the_bit(
    tmp_path, capfd, monkeypatch, architecture, dtype, is_loaded
):
    """The base is in fp32, and so is the export; OPT's output layer is tied to the embedding."""
    model = tiny_model(architecture)
    base = bits(model)
    delta = save_run(tmp_path, model, dtype)
    if is_loaded:
        make_older(tmp_path)
    else:
        monkeypatch.setattr("gem_ds.models.export.load_base", pytest.fail)
    with torch.no_grad():
        for name, values in delta.values.items():
            for flat_index, value in zip(CHOSEN, values, strict=True):
                model.get_parameter(name)[flat_index // 8, flat_index % 8] = value
    capfd.readouterr()
    assert cli.run("export", arguments(tmp_path)) == 0
    told = capfd.readouterr()
    assert "\r" not in told.err, "bars are for terminals"
    assert ("loaded in" in told.out) == (dtype != torch.float32)
    assert bits(type(model).from_pretrained(tmp_path / "out", dtype=dtype)) == bits(model)
    exported = type(model).from_pretrained(tmp_path / "out", dtype="auto")
    assert exported.dtype == torch.float32
    changed = {name for name, numbers in bits(exported).items() if numbers != base[name]}
    assert changed == delta.values.keys()
    assert sorted(os.listdir(tmp_path)) == ["base", "delta.safetensors", "out"]
    assert not any("token" in name for name in os.listdir(tmp_path / "out"))  # the base has none


def anonymous_memory() -> int:
    """Bytes of this process that are no file's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="counts the pages that Linux tells of")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_one_weight_at_a_time_is_in_memory(tmp_path, monkeypatch, suffix):
    """Sixteen of 8 MB, with entries on all their pages; and no model is made."""
    model = nn.ModuleList([nn.Linear(1024, 2048, bias=False) for _ in range(16)])
    weights, places = model.state_dict(), range(0, 2048 * 1024, 1000)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    if suffix == "bin":
        torch.save(weights, tmp_path / "base" / "pytorch_model.bin")
    else:
        save_file(weights, tmp_path / "base" / "model.safetensors")
    delta = make_delta(model, dict.fromkeys(weights, places))
    delta.save(tmp_path / "delta.safetensors")
    monkeypatch.setattr("gem_ds.models.export.load_base", pytest.fail)
    made, sizes, start = folder._merged, [], anonymous_memory()

    def counted(*arguments):
        result = made(*arguments)
        sizes.append(anonymous_memory() - start)
        return result

    monkeypatch.setattr(folder, "_merged", counted)
    assert cli.run("export", arguments(tmp_path)) == 0
    assert len(sizes) == 16
    assert max(sizes) < 10 * 2**23, "bytes; all together have 16 times that of one"
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    for name, weight in weights.items():
        weight.view(-1)[:: places.step] = delta.values[name]
        assert torch.equal(written[name], weight)


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(0, 2**32 - 1),
)
def test_any_entries_are_laid_over_any_bits(dtype, seed):
    """Ties, zeros of both signs and subnormals among them; what is no weight is left alone."""
    generator = torch.Generator().manual_seed(seed)
    word = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    low, high = torch.iinfo(word).min, torch.iinfo(word).max
    drawn = torch.randint(low, high, (2, 2, 7, 9), generator=generator).to(word).view(dtype)
    first, second = drawn.where(drawn.isfinite(), -0.0)
    model = nn.ParameterDict({f"model_{i}": weight.clone() for i, weight in enumerate(first)})
    chosen = [torch.rand(63, generator=generator).lt(0.3).nonzero().flatten() for _ in first]
    delta = make_delta(model, {n: c.tolist() for n, c in zip(model, chosen, strict=True)})
    for name, index, values in zip(model, chosen, second, strict=True):
        delta.values[name] = values.flatten()[index]
    files = {name: weight.detach().clone() for name, weight in model.items()}
    with tempfile.TemporaryDirectory() as scratch:
        base, out = Path(scratch, "base"), Path(scratch, "out")
        base.mkdir()
        out.mkdir()
        (base / "config.json").write_text("{}")
        save_file({**files, "other": torch.arange(4)}, base / "model.safetensors")
        prepare_folder(delta, str(base))(out)
        written = load_file(out / "model.safetensors")
    for name, index, values in zip(files, chosen, second, strict=True):
        for place in index.tolist():
            files[name].view(-1)[place] = values.flatten()[place]
        assert torch.equal(written.pop(name).view(word), files[name].view(word))
    assert written.keys() == {"other"}


CONVERTER = """
import shutil, sys
folder, _, out = sys.argv[1:]
sys.exit("Model Foo is not supported") if "refuse" in out else None
shutil.copy(folder + "/model.safetensors", out)
"""


def test_llama_cpps_converter_is_given_the_exported_folder(tmp_path, capfd, monkeypatch):
    """One that copies the weights; the real one was run by hand (docs/deltas.md)."""
    save_run(tmp_path, tiny_model("llama"))
    monkeypatch.setenv("PATH", str(tmp_path))
    to_gguf = arguments(tmp_path, "--format", "gguf")
    assert "clone https://github.com/ggml-org/llama.cpp" in refusal(capfd, to_gguf)
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text(CONVERTER)
    converter.chmod(0o755)
    for argv in ([*arguments(tmp_path)[:5], str(tmp_path / "hf")], to_gguf):
        assert cli.run("export", argv) == 0
    assert sorted(os.listdir(tmp_path / "out")) == [".gem_ds.json", "model.gguf"]
    written = (tmp_path / "out" / "model.gguf").read_bytes()
    assert written == (tmp_path / "hf" / "model.safetensors").read_bytes()
    capfd.readouterr()
    to_gguf[5] = str(tmp_path / "refuse")
    assert refusal(capfd, to_gguf).endswith("base: Model Foo is not supported")
    assert not (tmp_path / "refuse").exists()


# Refusals


def test_an_output_folder_in_use_is_kept_unless_an_export_wrote_it(tmp_path, capfd):
    save_run(tmp_path, tiny_model("llama"))
    out, overwrite = tmp_path / "out", arguments(tmp_path, "--overwrite_output_dir")
    out.write_text("mine")
    assert "is a file" in refusal(capfd, overwrite)
    assert out.read_text() == "mine"
    out.unlink()
    out.mkdir()
    assert cli.run("export", arguments(tmp_path)) == 0, "an empty folder is filled"
    assert "holds an export: pass --overwrite_output_dir" in refusal(capfd, arguments(tmp_path))
    (run := tmp_path / "run").mkdir()
    manifest.claim(run, "trainer_state.json").write_text("{}")
    over_a_run = [*arguments(tmp_path)[:-1], str(run), "--overwrite_output_dir"]
    assert "holds a run: choose another folder" in refusal(capfd, over_a_run)
    assert (run / "trainer_state.json").is_file()
    (tmp_path / "link").symlink_to("out")
    by_link = [*arguments(tmp_path)[:-1], str(tmp_path / "link"), "--overwrite_output_dir"]
    for argv in (overwrite, by_link):
        assert cli.run("export", argv) == 0
        AutoModelForCausalLM.from_pretrained(out)
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for argv in (overwrite, by_link):
        assert "out holds what no manifest of gem_ds lists (.git/HEAD)" in refusal(capfd, argv)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    deeper = [*arguments(tmp_path)[:-1], str(tmp_path / "a" / "b")]
    assert cli.run("export", deeper) == 0
    assert (tmp_path / "a" / "b" / "config.json").exists()


def test_a_folder_with_a_config_json_is_no_export(tmp_path, capfd):
    """Of a program in JavaScript, or a model that somebody has: the only one, perhaps."""
    save_run(tmp_path, tiny_model("llama"))
    (tmp_path / "out" / "src").mkdir(parents=True)
    for name in ("config.json", "package.json", "src/index.js"):
        (tmp_path / "out" / name).write_text("{}")
    told = refusal(capfd, arguments(tmp_path, "--overwrite_output_dir"))
    assert "lists (config.json, package.json, src/index.js)" in told
    shutil.rmtree(tmp_path / "out")
    shutil.copytree(tmp_path / "base", tmp_path / "out")
    assert "lists (config.json" in refusal(capfd, arguments(tmp_path, "--overwrite_output_dir"))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_a_killed_export_left_is_cleared_by_the_next(tmp_path, monkeypatch):
    save_run(tmp_path, tiny_model("llama"))
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_delete_temporary", lambda folder: None)  # as of a killed process
        patch.setattr(manifest, "_replace", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export.main(arguments(tmp_path))
    assert len(os.listdir(tmp_path)) == 3
    export.main(arguments(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["base", "delta.safetensors", "out"]


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


def make_older(folder: Path) -> None:
    path = folder / "delta.safetensors"
    as_older(Delta.load(path)).save(path)


def nameless_base(folder: Path) -> None:
    make_older(folder)
    config = {"model_type": "t5", "architectures": ["NoSuchModel"]}  # and no causal model
    (folder / "base" / "config.json").write_text(json.dumps(config))


def base_with_code(folder: Path) -> None:
    make_older(folder)
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "base" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_base, "made for other base weights"),
        (lambda folder: os.truncate(folder / "delta.safetensors", 99), "truncated"),
        (lambda folder: (folder / "delta.safetensors").unlink(), "no delta file at"),
        (incomplete_base, "in another shape, for example model.norm.weight: pass a complete"),
        (nameless_base, "names no class of transformers"),
        (base_with_code, "pass --trust_remote_code to allow it"),
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

    def full(folder, *_):
        (Path(folder) / "model.safetensors").symlink_to("/dev/full")
        (Path(folder) / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr("gem_ds.models.export.write_changed", full)
    assert "free space on that disk" in refusal(capfd, arguments(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["base", "delta.safetensors"]


def test_the_script_exits_with_the_status(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert caught.value.code == 1
    assert "no delta file at" in capfd.readouterr().err
