"""The model card parses, says what was measured, and its snippet runs."""

import re
import shlex

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from gem_ds.files.card import ModelCard
from tests.deltas import make_delta

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


def card(**changes: object) -> str:
    return ModelCard(**{**FACTS, **changes}).text()


def front_matter(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)[1])


def test_the_front_matter_is_what_the_hub_reads():
    fields = front_matter(card())
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


@pytest.mark.parametrize(
    "base_model", ["/models/base", "../base", "./base", "a/b/c", "C: no", "here/base-1b"]
)
def test_a_folder_is_not_given_to_the_hub_as_a_model(tmp_path, monkeypatch, base_model):
    """The last one looks like a model of the Hub."""
    (tmp_path / "here" / "base-1b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = card(base_model=base_model, dataset=None)
    assert front_matter(text).keys() == {"library_name", "tags", "model-index"}
    assert f"`{base_model}`" in text


def test_the_tables_show_the_numbers():
    text = card()
    for words in (
        "1,234 of its 1,000,000 parameters (0.1234%)",
        "| Metric | Base model | Fine-tuned |\n| --- | --- | --- |",
        "| strict-match | 0.125 | 0.4375 |",
        "| eval_loss | not measured | 1.5 |",
        "| learning_rate | 2e-05 |",
        "| targets | ['q', 'v'] |",
    ):
        assert words in text
    alone = card(base_results={})
    assert "| Metric | Fine-tuned |\n| --- | --- |\n| strict-match | 0.4375 |" in alone
    assert "was not evaluated" in card(results={})


@pytest.mark.parametrize("method", ["magnitude", "my own\nmethod"])
def test_entries_chosen_in_any_way_are_told_as_such(method):
    text = card(method=method)
    assert "Every other parameter of the base is unchanged" in text
    assert f"with `{' '.join(method.split())}`." in text
    assert "| `mask.safetensors` |" in text
    assert "sparse-fine-tuning" in front_matter(text)["tags"]


def test_hostile_text_breaks_neither_the_yaml_nor_the_tables():
    text = card(task="a: b\n---\n# c | {d}", settings={"x|y": "p|q\nr"})
    assert front_matter(text)["tags"][-1] == "a: b --- # c | {d}"
    assert "| x\\|y | p\\|q r |" in text


def test_the_snippet_runs_and_the_command_parses(tmp_path, monkeypatch):
    shape = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).bfloat16()
    folder = tmp_path / "base model's"
    model.save_pretrained(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    make_delta(model, {name: [0, 1]}, str(folder), [5.0, 7.0]).save(tmp_path / "delta.safetensors")
    text = card(base_model=str(folder), revision=None)

    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], scope)
    weight = scope["model"].get_parameter(name)
    assert weight.view(-1)[:2].tolist() == [5.0, 7.0]
    scope["applied"].revert()
    assert torch.equal(weight, model.get_parameter(name))

    command = shlex.split(re.search(r"```shell\n(.*?)```", text, re.DOTALL)[1])
    assert command[command.index("--model_name_or_path") + 1] == str(folder)
