r"""A model's folder is its base's but for the weights, whoever wrote the base and however.

tests/files_4_57/ was written by transformers 4.57.6 and torch 2.13 and is never made again: in
llama/ a Llama in bfloat16 with a RoPE base of 500,000 and scaled positions, and its tokenizer, by
`save_pretrained(max_shard_size="8KB")`; in logits.safetensors what 4.57.6 computes in fp32 of the
tokens 3 to 98, at each eighth place: of that folder, and with the values of `trained_values`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedModel,
)

from gem_ds.formats import export
from gem_ds.models.folder import write_folder
from tests.deltas import make_delta

FILES = Path(__file__).parents[1] / "files_4_57"
LLAMA = FILES / "llama"


def contents(folder: Path) -> dict[str, bytes]:
    """The files that hold no weights, by name."""
    return {
        p.name: p.read_bytes()
        for p in folder.glob("[!.]*")
        if p.is_file() and p.suffix != ".safetensors"
    }


def tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file of weights."""
    return {path.name: load_file(path) for path in folder.glob("*.safetensors")}


def trained_values(name: str) -> tuple[list[int], list[float]] | None:
    """Which entries of a weight are trained, and to what."""
    parts = name.split(".")
    if parts[-2] not in ("q_proj", "v_proj"):
        return None
    first = 7 * int(parts[2])
    return list(range(first, first + 60, 5)), torch.linspace(-2, 2, 12).bfloat16().tolist()


def exported(base: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """An export of a base with the values of `trained_values`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    names = [name for name, _ in model.named_parameters() if trained_values(name)]
    chosen = {name: trained_values(name)[0] for name in names}
    delta = make_delta(model, chosen, values=trained_values(names[0])[1])
    delta.save(folder / "delta.safetensors")
    flags = f"--delta {folder}/delta.safetensors --output_dir {folder}/out"
    export.main(["--model_name_or_path", str(base), *flags.split()])
    return folder / "out"


def test_a_folder_of_another_version_stays_one_of_it(tmp_path, capsys):
    """The logits are those that version computes; by hand it was seen to load this export."""
    out = exported(LLAMA, tmp_path)
    assert contents(out) == contents(LLAMA)
    assert "before 5" not in capsys.readouterr().out
    base, found = tensors(LLAMA), tensors(out)
    assert {file: list(found[file]) for file in found} == {file: list(base[file]) for file in base}
    for file, weights in base.items():
        for name, expected in weights.items():
            if trained := trained_values(name):
                for place, value in zip(*trained, strict=True):
                    expected.view(-1)[place] = value
            assert torch.equal(found[file][name], expected), name
    recorded = load_file(FILES / "logits.safetensors")
    ids = torch.arange(3, 99)[None]
    for folder, name in ((LLAMA, "base"), (out, "trained")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, ::8]
        torch.testing.assert_close(logits, recorded[name], rtol=1e-4, atol=1e-4)
    text = "A sentence."
    tokens = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (LLAMA, out)]
    assert tokens[0] == tokens[1]


def as_one_bin(folder: Path) -> None:
    """Both names of a tied weight, which share their memory, as torch writes them."""
    weights = {k: v for file in tensors(folder).values() for k, v in file.items()}
    for path in folder.glob("model*"):
        path.unlink()
    weights["model.embed_tokens.weight"] = weights["lm_head.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    edit_config(folder, tie_word_embeddings=True)


def as_sharded_bin(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for path in sorted(folder.glob("*.safetensors")):
        name = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / name)
        path.unlink()
    names = {
        key: file.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        for key, file in index["weight_map"].items()
    }
    text = json.dumps(index | {"weight_map": names})
    (folder / "pytorch_model.bin.index.json").write_text(text)
    (folder / "model.safetensors.index.json").unlink()


def with_more(folder: Path) -> None:
    """Tensors that the model does not read, and files that nobody should copy."""
    path = folder / "model-00002-of-00002.safetensors"
    extra = {"model.layers.2.mtp.weight": torch.ones(3, 3), "rotary.inv_freq": torch.ones(2)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt", "by": "hand"})
    for name in ("flax_model.msgpack", "model.gguf", "optimizer.pt", ".hidden"):
        (folder / name).touch()
    (folder / "original").mkdir()
    (folder / "original" / "params.json").touch()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "config_link.json").symlink_to("config.json")  # as in the Hub's cache


def in_float32(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        weights = {name: w.float() + 1e-6 for name, w in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    edit_config(folder, dtype="float32")


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("make", [as_one_bin, as_sharded_bin, with_more, in_float32])
def test_weights_keep_names_files_and_dtypes(tmp_path, make):
    """What is in the files beside the trained entries is there to the bit."""
    base = tmp_path / "base"
    shutil.copytree(LLAMA, base)
    make(base)
    out = exported(base, tmp_path)
    files = {
        path.name: load_file(path) if path.suffix == ".safetensors" else torch.load(path)
        for path in base.iterdir()
        if path.suffix in (".safetensors", ".bin")
    }
    found = tensors(out)
    names = {f.replace("pytorch_model", "model").replace(".bin", ".safetensors") for f in files}
    assert set(found) == names
    for file, weights in files.items():
        new = found[file.replace("pytorch_model", "model").replace(".bin", ".safetensors")]
        assert set(new) == set(weights)
        for name, old in weights.items():
            assert new[name].dtype == old.dtype
            is_same = new[name].view(-1) == old.view(-1)
            places = (~is_same).nonzero().flatten().tolist()
            assert places == (trained_values(name) or ([],))[0], name
    if len(found) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: f for f, weights in found.items() for name in weights}
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    left = {path.name for path in base.iterdir()} - {path.name for path in out.iterdir()}
    assert {name for name in left if not name.startswith("pytorch_model")} <= {
        *("flax_model.msgpack", "model.gguf", "optimizer.pt", ".hidden", "original"),
    }
    if make is with_more:
        assert (out / "additional_chat_templates" / "tools.jinja").is_file()
        assert not (out / "config_link.json").is_symlink()
        with safe_open(out / "model-00002-of-00002.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt", "by": "hand"}


def test_values_that_the_base_cannot_hold_change_its_dtype(tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(LLAMA, base)
    edit_config(base, transformers_version="5.1.0", part_config={"torch_dtype": "bfloat16", "a": 1})
    before = json.loads((base / "config.json").read_text())
    out = exported(base, tmp_path, torch.float32)
    assert {w.dtype for file in tensors(out).values() for w in file.values()} == {torch.float32}
    config = json.loads((out / "config.json").read_text())
    part = {"torch_dtype": "float32", "a": 1}
    assert config == before | {"dtype": "float32", "part_config": part}
    told = capsys.readouterr().out
    assert "so all are float32" in told
    assert "transformers 5.1.0 wrote" in told


def tiny(architecture: str) -> PreTrainedModel:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 24, "num_attention_heads": 2}
    more = {"intermediate_size": 16, "num_local_experts": 3, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes, **more))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "gpt2", "phi"])
def test_a_model_trained_whole_has_the_files_of_its_base(tmp_path, architecture):
    """Experts that transformers holds in one tensor are one by one again."""
    tiny(architecture).save_pretrained(tmp_path / "base", max_shard_size="5KB")
    (tmp_path / "out").mkdir()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    write_folder(tmp_path / "out", tmp_path / "base", model, dict(model.named_parameters()))
    assert contents(tmp_path / "out") == contents(tmp_path / "base")
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    assert {file: set(after[file]) for file in after} == {f: set(before[f]) for f in before}
    for file, weights in before.items():
        for name, old in weights.items():
            torch.testing.assert_close(after[file][name], old + 1)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertModel])
@pytest.mark.parametrize("is_legacy", [False, True])
def test_an_encoder_gets_the_names_of_its_class_and_its_labels(tmp_path, kind, *, is_legacy):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 24, "num_attention_heads": 2}
    kind(BertConfig(**sizes, intermediate_size=16)).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    if is_legacy:
        renamed = {
            name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
            for name, tensor in load_file(path).items()
        }
        save_file(renamed, path, metadata={"format": "pt"})
    edit_config(tmp_path / "base", num_labels=2, own_key="kept")
    config = AutoConfig.from_pretrained(tmp_path / "base", id2label={0: "no", 1: "yes", 2: "?"})
    config.label2id = {"no": 0, "yes": 1, "?": 2}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", config=config)
    head = ["classifier.weight", "classifier.bias", "bert.pooler.dense.weight"]
    head.append("bert.pooler.dense.bias")
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", tmp_path / "base", model, dict(model.named_parameters()), head)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["own_key"] == "kept"
    again, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report
    assert again.config.id2label == {0: "no", 1: "yes", 2: "?"}
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_a_base_without_a_place_for_a_weight_is_refused(tmp_path):
    tiny("phi").save_pretrained(tmp_path / "base")
    model = tiny("gpt2")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="has no place for the weight"):
        write_folder(tmp_path / "out", tmp_path / "base", model, dict(model.named_parameters()))
