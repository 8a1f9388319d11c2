"""What lies in a model's folder beside the model: an adapter, code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gem_ds.evaluate.model import SamplingArguments, model_facts, open_files
from gem_ds.formats import export
from gem_ds.models.adapters import put_adapter
from gem_ds.models.load import _from_pretrained, load_weights, open_model, trainable_config
from gem_ds.planning.main import read_setting
from gem_ds.train.arguments import parse_arguments
from tests.deltas import as_older, make_delta
from tests.tiny_model import Tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tiny: Tiny) -> Tiny:
    """With an adapter in adapter/, in both/ beside the model, and in other/; and a delta."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny.model)
    delta = make_delta(model, {"model.layers.0.self_attn.q_proj.weight": [1, 2]})
    as_older(delta).save(tiny.folder / "delta.safetensors")
    torch.manual_seed(3)
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, init_lora_weights=False)
    config.target_modules = {"q_proj", "v_proj"}
    get_peft_model(model, config).save_pretrained(tiny.folder / "adapter")
    shutil.copytree(tiny.folder / "adapter", tiny.folder / "other")
    shutil.copytree(tiny.model, tiny.folder / "both")
    shutil.copytree(tiny.folder / "adapter", tiny.folder / "both", dirs_exist_ok=True)
    return tiny


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


def test_an_adapter_beside_a_model_is_put_in_once(tiny, capsys):
    """As if its folder were named, and as transformers alone would; results say which it was."""
    both, adapter = str(tiny.folder / "both"), str(tiny.folder / "adapter")
    expected = logits(AutoModelForCausalLM.from_pretrained(both).eval())
    by_hand = AutoModelForCausalLM.from_pretrained(tiny.model)
    put_adapter(by_hand, adapter)
    torch.testing.assert_close(logits(by_hand), expected)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tiny.model)), expected)
    arguments = SamplingArguments(model_name_or_path=both, output_dir="out")
    files, _ = open_files(arguments)
    assert capsys.readouterr().out == f"{both} holds an adapter beside the model, which is put in\n"
    found: Any = model_facts(arguments, files)["adapter_sha256"]
    assert set(found) == {"adapter_config.json", "adapter_model.safetensors"}
    for named in (files, open_model(both, adapter=both), open_model(str(tiny.model), adapter=both)):
        torch.testing.assert_close(logits(load_weights(named, CPU)), expected)


def plan(folder: Path, name: str) -> Any:
    flags = ["--model_name_or_path", str(folder / name), "--task", "gsm8k"]
    return read_setting(parse_arguments([*flags, "--output_dir", str(folder / "out")]), 1)


def exported(folder: Path, name: str) -> Any:
    delta, out = folder / "delta.safetensors", folder / "out"
    return export.export(str(folder / name), delta, out)


def evaluated(folder: Path, name: str, **flags: Any) -> Any:
    arguments = SamplingArguments(model_name_or_path=str(folder / name), output_dir="out", **flags)
    return open_files(arguments)


USES: dict[str, Callable[[Path, str], Any]] = {
    "training": lambda folder, name: trainable_config(str(folder / name)),
    "planning": plan,
    "export": exported,
    "evaluation with a delta": lambda folder, name: evaluated(
        folder, name, delta=str(folder / "delta.safetensors")
    ),
    "evaluation with another": lambda folder, name: evaluated(
        folder, name, adapter=str(folder / "other")
    ),
    "evaluation in partitions": lambda folder, name: evaluated(
        folder, name, deepspeed="ds_configs/zero3.json"
    ),
    "evaluation in vLLM": lambda folder, name: evaluated(folder, name, backend="vllm"),
    "evaluation": evaluated,
}


@pytest.mark.parametrize("use", USES)
def test_an_adapter_beside_a_model_is_refused_where_it_would_be_lost(tiny, use):
    """And one alone everywhere, with its base and what to pass."""
    if use != "evaluation":
        with pytest.raises(ValueError, match=r"both holds an adapter .* beside the model.*merge"):
            USES[use](tiny.folder, "both")
    only = rf"adapter holds no model, only an adapter of peft for {tiny.model}: pass that model"
    with pytest.raises(ValueError, match=only):
        USES[use](tiny.folder, "adapter")
    assert not (tiny.folder / "out").exists()


CODE = """\
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM

with pathlib.Path({mark!r}).open("a") as file:
    file.write("ran")


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder whose model is code that lies there, and the file that shows that it ran."""
    monkeypatch.setattr("builtins.input", pytest.fail)  # nobody is asked
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", tmp_path / "cache")
    folder, mark = tmp_path / "own", tmp_path / "mark"
    shutil.copytree(tiny.model, folder)
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    changes = {"model_type": "own_llama", "architectures": ["OwnModel"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder, mark


def test_code_runs_where_the_flag_says_so_and_nowhere_else(tiny, tmp_path, own_code, capsys):
    """Nothing is asked, whatever standard input would answer."""
    folder, mark = own_code
    delta, out = tiny.folder / "delta.safetensors", tmp_path / "out"
    refused: list[Callable[[], Any]] = [
        lambda: trainable_config(str(folder)),
        lambda: plan(tmp_path, "own"),
        lambda: export.export(str(folder), delta, out),
        lambda: evaluated(tmp_path, "own"),
        lambda: evaluated(tmp_path, "own", delta=str(delta)),
    ]
    for use in refused:
        with pytest.raises(ValueError, match="pass --trust_remote_code to allow it"):
            use()
    assert not mark.exists()
    files, _ = evaluated(tmp_path, "own", trust_remote_code=True)
    assert type(load_weights(files, CPU)).__name__ == "OwnModel"
    assert mark.exists()
    words = f"--model_name_or_path {folder} --delta {delta} --output_dir {out}"
    export.main([*words.split(), "--trust_remote_code"])
    assert (out / "own.py").read_bytes() == (folder / "own.py").read_bytes()
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(f / "model.safetensors")[name] for f in (folder, out))
    assert (before != after).nonzero().tolist() == [[0, 1], [0, 2]]


def test_a_tokenizers_code_does_not_run_either(tiny, tmp_path, own_code):
    folder, mark = own_code
    shutil.copy(tiny.model / "config.json", folder / "config.json")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    auto_map = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    changes = {"tokenizer_class": "OwnTokenizer", "auto_map": auto_map}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match="pass --trust_remote_code to allow it"):
        evaluated(tmp_path, "own")
    assert not mark.exists()


def test_a_model_that_transformers_knows_needs_no_code_of_its_own(tmp_path, own_code):
    """As many on the Hub have, from before it did."""
    folder, mark = own_code
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    files, _ = evaluated(tmp_path, "own")
    assert isinstance(load_weights(files, CPU), LlamaForCausalLM)
    assert not mark.exists()


def test_a_package_that_a_model_needs_and_that_is_missing_is_told():
    """As that of --attn_implementation flash_attention_2, or of code that comes with a model."""

    class Model:
        @staticmethod
        def from_pretrained(*_: object, **__: object) -> None:
            raise ImportError("the package flash_attn is not installed")

    with pytest.raises(ValueError, match=r"M cannot be loaded: the package flash_attn is not inst"):
        _from_pretrained("M", LlamaConfig(), model_class=Model)
