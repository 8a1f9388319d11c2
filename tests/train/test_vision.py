"""Models that read images too, trained on text: their language model learns, as any other does."""

import json
import shutil

import pytest
import torch
from torch import nn

from gem_ds.files.apply import apply_delta
from gem_ds.models.encoders import auto_class
from gem_ds.train import main as train
from tests.runs import delta_of, logged
from tests.tiny import CONFIGS, model_of, naive_loss, tiny_config
from tests.tiny_model import REPOSITORY, Tiny

pytestmark = pytest.mark.slow  # starts engines or programs


@pytest.mark.parametrize(("kind", "zero"), [("gemma3", 0), ("qwen2_vl", 3), ("llava", 2)])
def test_text_trains_the_language_model_and_nothing_else(kind, zero, tiny, tmp_path):
    """Qwen2-VL and LLaVA are no causal models to transformers, though they write."""
    folder = tmp_path / kind
    shutil.copytree(tiny.model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    vocab_size = json.loads((tiny.model / "config.json").read_text())["vocab_size"]
    text_config = CONFIGS[kind]["text_config"] | {"vocab_size": vocab_size}
    config = tiny_config(kind, text_config=text_config)
    model = model_of(config, auto_class(config).from_config)
    model.save_pretrained(folder)
    flags = {"model_name_or_path": folder, "max_steps": 2, "density": "0.005"}
    flags["deepspeed"] = REPOSITORY / "ds_configs" / f"zero{zero}.json"
    train.main(tiny.flags(tmp_path / "run", **flags))
    delta = delta_of(tmp_path / "run")
    assert all(name.startswith("model.language_model.") for name in delta.values)
    losses = [loss for _, loss in logged(tmp_path / "run", "eval_loss")]
    model.eval()
    assert _mean_loss(model, tiny) == pytest.approx(losses[0], rel=1e-5)
    apply_delta(model, delta)
    assert _mean_loss(model, tiny) == pytest.approx(losses[-1], rel=1e-5)
    assert losses[-1] < losses[0]


@torch.no_grad()
def _mean_loss(model: nn.Module, tiny: Tiny) -> float:
    """Per answer token, one example at a time."""
    examples = tiny.encoded("test.jsonl")
    total = sum(naive_loss(model, example).item() for example in examples)
    return total / sum(len(tokens) - prompt_length for tokens, prompt_length in examples)
