"""What of an encoder is trained as its head: the same layers whether or not the files hold them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from gem_ds.comm import Comm
from gem_ds.encoders import head_names, set_head
from gem_ds.targets import head_layers
from gem_ds.tasks import Kind
from launch.arguments import parse_arguments
from launch.model import load_model
from tests.tiny_tasks import LABELS, make_task

SMALL = {"vocab_size": 50, "hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2}
SPECIAL = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}

#: The layers that a classification reads and nothing else does, as transformers builds them.
HEADS: dict[str, tuple[str, ...]] = {
    "bert": ("bert.pooler.dense", "classifier"),
    "deberta-v2": ("pooler.dense", "classifier"),
    "distilbert": ("pre_classifier", "classifier"),
    "electra": ("classifier.dense", "classifier.out_proj"),
    "modernbert": ("head.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
}


def make_encoder(model_type: str) -> Any:
    """A model of one layer with a classifier of two outputs."""
    sizes = {"dim": 12, "hidden_dim": 20, "n_heads": 2, "n_layers": 1, "vocab_size": 50}
    if model_type != "distilbert":
        sizes = SMALL | {"num_hidden_layers": 1} | SPECIAL
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes)
    return AutoModelForSequenceClassification.from_config(config)


def load(folder: Path) -> tuple[Any, list[str]]:
    """The model of a folder as a run loads it, and the names of its head."""
    config = AutoConfig.from_pretrained(folder)
    set_head(config, "saved", make_task("labels"))
    flags = ["--model_name_or_path", str(folder), "--task", "rte", "--output_dir", "unused"]
    return load_model(parse_arguments(flags), config, {}, Comm(torch.device("cpu")))


@pytest.mark.parametrize("model_type", HEADS)
def test_a_saved_classifier_is_trained_from_where_it_is(tmp_path: Path, model_type: str) -> None:
    saved = make_encoder(model_type)
    saved.save_pretrained(tmp_path)
    model, head = load(tmp_path)
    layers = head_layers(model, head)
    assert sorted(layers) == sorted(f"{owner}.weight" for owner in HEADS[model_type])
    for name in head:
        torch.testing.assert_close(model.get_parameter(name), saved.get_parameter(name))


@pytest.mark.parametrize("model_type", sorted(HEADS.keys() - {"modernbert"}))
def test_the_head_of_a_base_model_is_the_same(tmp_path: Path, model_type: str) -> None:
    model = make_encoder(model_type)
    model.base_model.save_pretrained(tmp_path)
    bare, head = load(tmp_path)
    assert set(head) == head_names(bare) == head_names(model)


def test_a_modernbert_without_the_norm_of_its_head_is_refused(tmp_path: Path) -> None:
    make_encoder("modernbert").base_model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"for example head\.norm\.weight: pass a complete model\.$"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "saved", "words"),
    [
        ("labels", ("a", "b", "c"), "3 outputs and this task needs 2"),
        ("number", ("a", "b"), "2 outputs and this task needs 1"),
        ("labels", (LABELS[1].upper(), LABELS[0].upper()), "its outputs in another order (not_"),
    ],
)
def test_a_saved_head_with_other_outputs_is_refused(
    tmp_path: Path, kind: Kind, saved: tuple[str, ...], words: str
) -> None:
    config = make_encoder("bert").config
    config.id2label = dict(enumerate(saved))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    told = f"m has a classification head with {words}"
    with pytest.raises(ValueError, match=rf"^{re.escape(told)}.*\.$"):
        set_head(config, "m", make_task(kind))
