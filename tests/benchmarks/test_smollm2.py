"""The real language model: the folder that benchmarks/smollm2.py makes holds one."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import smollm2


@pytest.fixture(scope="module")
def folder() -> Path:
    """That of GEM_SMOLLM2."""
    path = os.environ.get("GEM_SMOLLM2")
    if not path or not Path(path).is_dir():
        pytest.skip("no model: set GEM_SMOLLM2 to what benchmarks/smollm2.py has made")
    return Path(path)


def test_a_sentence_is_likelier_than_its_words_in_another_order(folder):
    """Weights in wrong places, or another tokenizer, would know no English."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.pad_token_id == model.config.pad_token_id is not None
    losses = []
    for text in (
        "The cat sat on the mat and looked out of the window at the birds.",
        "window the at out mat sat The birds looked on cat and of. the the",
    ):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert losses[0] < 4 < losses[1]


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no model to replace"):
        smollm2.main([str(tmp_path)])
    assert (tmp_path / "notes.txt").exists()
