"""Which models are encoders, what they read, and what of them is trained as their head.

The head is the same layers whether or not the files hold them.
"""

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from gem_ds.distributed.comm import Comm
from gem_ds.models.encoders import ENCODERS, head_names, is_encoder, num_positions, set_head
from gem_ds.models.load import load_for_training
from gem_ds.models.targets import head_layers
from tests.tiny_tasks import LABELS, make_task

SMALL = {"vocab_size": 50, "hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2}
SPECIAL = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}

#: The layers that a classification reads and nothing else does, as transformers builds them.
HEADS: dict[str, tuple[str, ...]] = {
    "bert": ("bert.pooler.dense", "classifier"),
    "big_bird": ("classifier.dense", "classifier.out_proj"),  # it reads no pooler
    "deberta-v2": ("pooler.dense", "classifier"),
    "distilbert": ("pre_classifier", "classifier"),
    "electra": ("classifier.dense", "classifier.out_proj"),
    "megatron-bert": ("bert.pooler.dense", "classifier"),
    "modernbert": ("head.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "xlm": ("sequence_summary.summary",),
}


def make_encoder(model_type: str, **more: object) -> Any:
    """A model of one layer with a classifier of two outputs."""
    sizes = {"dim": 12, "hidden_dim": 20, "n_heads": 2, "n_layers": 1, "vocab_size": 50}
    if model_type != "distilbert":
        sizes = SMALL | {"num_hidden_layers": 1} | SPECIAL
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes, **more)
    return AutoModelForSequenceClassification.from_config(config)


def load(folder: Path) -> tuple[Any, list[str]]:
    """The model of a folder as a run loads it, and the names of its head."""
    config = AutoConfig.from_pretrained(folder)
    set_head(config, "saved", make_task("labels"))
    alone = Comm(torch.device("cpu"))
    return load_for_training(str(folder), config, {}, alone, dtype=torch.float32, seed=42)


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ("Connection closed by peer", RuntimeError),
        ("CUDA error: an illegal memory access", RuntimeError),
        ("Error(s) in loading state_dict for Bert:", ValueError),
        ("[enforce fail] PytorchStreamReader failed reading file", ValueError),
    ],
)
def test_only_what_is_the_files_fault_is_told_as_such(tmp_path, told, kind):
    make_encoder("bert").config.save_pretrained(tmp_path)
    failing = mock.Mock(from_pretrained=mock.Mock(side_effect=RuntimeError(told)))
    with (
        mock.patch("gem_ds.models.load.auto_class", return_value=failing),
        pytest.raises(kind, match=re.escape(told)) as caught,
    ):
        load(tmp_path)
    assert ("cannot be loaded" in str(caught.value)) == (kind is ValueError)


def test_no_encoder_that_transformers_loads_as_a_causal_model_is_missing():
    """One would be trained on answers that it sees."""
    causal, masked = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
    both = {name for name in causal.keys() & masked if not CONFIG_MAPPING[name].is_encoder_decoder}
    without_masked = {"bert-generation"}  # transformers has no masked language model of it
    assert set(ENCODERS) & causal.keys() == both | without_masked
    assert not {name for name in ENCODERS if not is_encoder(CONFIG_MAPPING[name]())}


@pytest.mark.parametrize(("model_type", "flag"), [("bert", "is_decoder"), ("xlm", "causal")])
def test_an_encoder_that_is_told_to_look_back_only_is_none(model_type, flag):
    assert not is_encoder(AutoConfig.for_model(model_type, **{flag: True}))


#: Of these no positions are known: one has no classifier, the other is of another build.
UNREAD = ("bert-generation", "reformer")


@pytest.mark.parametrize("model_type", sorted(set(ENCODERS).difference(UNREAD)))
def test_an_encoder_reads_as_many_tokens_as_it_tells(model_type):
    more = {"default_language": "en_XX"} if model_type == "xmod" else {}
    model = make_encoder(model_type, max_position_embeddings=16, **more)
    limit = num_positions(model.config)
    model(input_ids=torch.full((1, limit), 5))
    if model_type != "modernbert":  # it turns by angles, of which there is no last
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.parametrize("model_type", HEADS)
def test_the_head_is_the_same_layers_saved_or_not(tmp_path, model_type):
    """A saved classifier is trained from where it is."""
    saved = make_encoder(model_type)
    saved.save_pretrained(tmp_path / "whole")
    model, head = load(tmp_path / "whole")
    layers = head_layers(model, head)
    assert sorted(layers) == sorted(f"{owner}.weight" for owner in HEADS[model_type])
    for name in head:
        torch.testing.assert_close(model.get_parameter(name), saved.get_parameter(name))
    saved.base_model.save_pretrained(tmp_path / "base")
    if model_type == "modernbert":  # its head has a norm, which a seed cannot make
        with pytest.raises(
            ValueError, match=r"example head\.norm\.weight: pass a complete model\.$"
        ):
            load(tmp_path / "base")
        return
    bare, head = load(tmp_path / "base")
    assert set(head) == head_names(bare) == head_names(saved)


@pytest.mark.parametrize(
    ("kind", "saved", "words"),
    [
        ("labels", ("a", "b", "c"), "3 outputs and this task needs 2"),
        ("number", ("a", "b"), "2 outputs and this task needs 1"),
        ("labels", (LABELS[1].upper(), LABELS[0].upper()), "its outputs in another order (not_"),
    ],
)
def test_a_saved_head_with_other_outputs_is_refused(tmp_path, kind, saved, words):
    config = make_encoder("bert").config
    config.id2label = dict(enumerate(saved))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    told = f"m has a classification head with {words}"
    with pytest.raises(ValueError, match=rf"^{re.escape(told)}.*\.$"):
        set_head(config, "m", make_task(kind))


def test_a_head_that_is_more_than_a_linear_layer_is_refused():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model: Any = make_encoder("bert")
    model.classifier = Doubled(model.config.hidden_size, 2)
    with pytest.raises(ValueError, match="of classifier, a Doubled: only heads of whole linear la"):
        head_layers(model, sorted(head_names(model)))
