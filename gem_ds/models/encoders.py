"""Encoders: models whose tokens see each other both ways, so that they classify and do not write.

Their classification head is every linear layer outside the base model, and of its pooler. It is
trained densely, beside the mask, and is no target, whether or not the files hold it: BERT's pooler
was trained for another purpose. First values of what the files lack depend on the seed and on each
parameter's name alone. N counts the base model, its pooler included. ModernBERT's head has a norm
besides, which comes pretrained and stays as it is; files without it are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from gem_ds.data.tasks import TaskData

#: Models whose tokens see each other both ways unless their configuration says ``is_decoder``, or
#: in XLM's words ``causal``. All that transformers would also load as causal models are among them.
ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "deberta", "deberta-v2"),
    *("distilbert", "electra", "ernie", "megatron-bert", "modernbert", "reformer", "rembert"),
    *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta"),
    *("xlm-roberta-xl", "xmod"),
)

#: Of these, the positions of a text begin behind the padding's.
_SHIFTED_POSITIONS = (
    *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"),
    *("xlm-roberta-xl", "xmod"),
)


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration is an encoder."""
    is_causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return config.model_type in ENCODERS and not is_causal


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that loads the model as GEM trains it.

    A model that reads images too and writes is a causal one, by whatever class it is found.
    """
    if is_encoder(config):
        return AutoModelForSequenceClassification
    is_causal = type(config) in AutoModelForCausalLM._model_mapping
    reads_images = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if reads_images and not is_causal else AutoModelForCausalLM


def num_positions(config: PretrainedConfig) -> int | None:
    """Tokens of the longest sequence that the model reads, where it tells."""
    text_config: Any = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    if limit and config.model_type in _SHIFTED_POSITIONS:
        limit -= text_config.pad_token_id + 1
    return int(limit) if limit else None


def set_head(config: PretrainedConfig, name: str, task: TaskData) -> None:
    """Give the configuration of an encoder the head that a task needs; leave a decoder's alone."""
    if not is_encoder(config):
        return
    if task.kind == "text":
        raise ValueError(
            f"{name} is an encoder ({config.model_type}), whose tokens see the answer, and this is "
            "a task whose answers are written: pass a causal language model."
        )
    labels = task.labels if task.kind == "labels" else ("score",)
    if any("SequenceClassification" in kind for kind in config.architectures or ()):
        _refuse_other_outputs(config, name, labels)
    set_labels(config, labels)
    is_number = task.kind == "number"
    config.problem_type = "regression" if is_number else "single_label_classification"


def set_labels(config: PretrainedConfig, labels: Sequence[str]) -> None:
    """Name the outputs of a classification head, and thereby settle their number."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}


def _refuse_other_outputs(config: PretrainedConfig, name: str, labels: Sequence[str]) -> None:
    """A saved head is trained from where it is, so an output must go on meaning its label."""
    saved = [str(label).lower() for _, label in sorted((config.id2label or {}).items())]
    own = [label.lower() for label in labels]
    if len(saved) != len(own):
        difference = f"{len(saved)} outputs and this task needs {len(own)}"
    elif saved != own and sorted(saved) == sorted(own):
        difference = f"its outputs in another order ({', '.join(saved)}) than this task's labels"
    else:
        return
    raise ValueError(
        f"{name} has a classification head with {difference}: pass the pretrained model without it."
    )


def head_names(model: Any) -> set[str]:
    """Names of the parameters of an encoder's classification head; a decoder has none."""
    if not is_encoder(model.config):
        return set()
    base = f"{model.base_model_prefix}."
    return {
        f"{owner}.{name}"
        for owner, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and (not owner.startswith(base) or owner.startswith(f"{base}pooler."))
        for name, _ in layer.named_parameters()
    }


def without_head(model: Any) -> nn.Module:
    """The part of a model whose parameters N counts: all of a decoder, an encoder's base model."""
    return model.base_model if is_encoder(model.config) else model  # type: ignore[no-any-return]


@torch.no_grad()
def initialise_head(model: nn.Module, names: Collection[str], std: float, seed: int) -> None:
    """Set new parameters, whole in this process: matrices normal(0, std), biases 0."""
    for name in names:
        parameter = model.get_parameter(name)
        if parameter.dim() == 1:
            parameter.zero_()
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
