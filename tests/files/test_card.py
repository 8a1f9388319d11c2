"""The model card parses, says what was measured, and its snippet runs."""

import re
import shlex

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from gem_ds.files.card import model_card
from gem_ds.files.delta import Delta
from gem_ds.files.mask import Mask, WeightInfo, checksum

FACTS = {
    "base_model": "owner/base-1b",
    "revision": "abc123",
    "task": "gsm8k",
    "dataset": "openai/gsm8k",
    "method": "gem",
    "product": "delta",
    "has_mask": True,
    "num_trainable": 1234,
    "num_parameters": 1_000_000,
    "dtype": "bfloat16",
    "settings": {"learning_rate": 2e-5, "targets": ["q", "v"], "seed": 42},
    "results": {"strict-match": 0.4375, "training loss": 0.5, "eval_loss": 1.5},
    "base_results": {"strict-match": 0.125},
}


def front_matter(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)[1])


def test_the_front_matter_is_what_the_hub_reads():
    fields = front_matter(model_card(**FACTS))
    (index,) = fields.pop("model-index")
    assert fields == {
        "library_name": "gem_ds",
        "base_model": "owner/base-1b",
        "base_model_relation": "finetune",
        "datasets": ["openai/gsm8k"],
        "tags": ["gem", "sparse-fine-tuning", "deepspeed", "gsm8k"],
    }
    (result,) = index["results"]
    assert result["task"] == {"type": "text-generation"}
    assert result["dataset"] == {"name": "gsm8k", "type": "openai/gsm8k"}
    assert result["metrics"] == [
        {"type": "strict-match", "value": 0.4375},
        {"type": "eval_loss", "value": 1.5},
    ]


@pytest.mark.parametrize("base_model", ["/models/base", "../base", "./base", "a/b/c", "C: no"])
def test_a_folder_is_not_given_to_the_hub_as_a_model(base_model):
    card = model_card(**{**FACTS, "base_model": base_model, "dataset": None})
    assert front_matter(card).keys() == {"library_name", "tags", "model-index"}
    assert f"`{base_model}`" in card


def test_a_folder_that_looks_like_a_hub_name_is_recognised(tmp_path, monkeypatch):
    (tmp_path / "owner" / "base-1b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front_matter(model_card(**FACTS))


def test_the_tables_show_the_numbers():
    card = model_card(**FACTS)
    assert "1,234 of its 1,000,000 parameters (0.1234%)" in card
    assert "| Metric | Base model | Fine-tuned |\n| --- | --- | --- |" in card
    assert "| strict-match | 0.125 | 0.4375 |" in card
    assert "| eval_loss | not measured | 1.5 |" in card
    assert "| learning_rate | 2e-05 |" in card
    assert "| targets | ['q', 'v'] |" in card
    alone = model_card(**{**FACTS, "base_results": None})
    assert "| Metric | Fine-tuned |\n| --- | --- |\n| strict-match | 0.4375 |" in alone
    assert "was not evaluated" in model_card(**{**FACTS, "results": {}})


@pytest.mark.parametrize("method", ["magnitude", "my own\nmethod"])
def test_entries_chosen_in_any_way_are_told_as_such(method):
    card = model_card(**{**FACTS, "method": method})
    assert "Every other parameter of the base is unchanged" in card
    assert f"with `{' '.join(method.split())}`." in card
    assert "| `mask.safetensors` |" in card
    assert "sparse-fine-tuning" in front_matter(card)["tags"]


def test_hostile_text_breaks_neither_the_yaml_nor_the_tables():
    task = "a: b\n---\n# c | {d}"
    card = model_card(**{**FACTS, "task": task, "settings": {"x|y": "p|q\nr"}})
    assert front_matter(card)["tags"][-1] == "a: b --- # c | {d}"
    assert "| x\\|y | p\\|q r |" in card


def test_the_snippet_runs_and_the_command_parses(tmp_path, monkeypatch):
    torch.manual_seed(0)
    shape = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).bfloat16()
    folder = tmp_path / "base model's"
    model.save_pretrained(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    base = model.get_parameter(name).detach().view(-1)[:2]
    info = WeightInfo(shape=(8, 8), dtype="bfloat16", checksum=checksum(base))
    mask = Mask(
        indices={name: torch.tensor([0, 1], dtype=torch.int32)},
        weights={name: info},
        base_model=str(folder),
        settings={},
    )
    values = torch.tensor([5.0, 7.0], dtype=torch.bfloat16)
    Delta(mask=mask, values={name: values}).save(tmp_path / "delta.safetensors")
    card = model_card(**{**FACTS, "base_model": str(folder), "revision": None})

    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], scope)
    weight = scope["model"].get_parameter(name).view(-1)
    assert weight[:2].tolist() == [5.0, 7.0]
    scope["applied"].revert()
    assert torch.equal(weight[:2], base)

    command = shlex.split(re.search(r"```shell\n(.*?)```", card, re.DOTALL)[1])
    assert command[command.index("--model_name_or_path") + 1] == str(folder)
