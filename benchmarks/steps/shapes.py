"""Models of known shapes with random weights, and data of random words."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from gem_ds.models.targets import find_targets

NUM_WORDS = 1000
_SPECIAL = ("<s>", "</s>")


def _llama(
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    vocab_size: int,
    *,
    is_tied: bool = False,
) -> Callable[[int | None], PretrainedConfig]:
    return lambda num_layers: LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocab_size,
        tie_word_embeddings=is_tied,
    )


def _qwen3_30b_a3b(num_layers: int | None) -> PretrainedConfig:
    return AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=2048,
        num_hidden_layers=num_layers or 48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        vocab_size=151936,
    )


#: By name what makes a configuration, given the number of layers (None: all).
SHAPES: Mapping[str, Callable[[int | None], PretrainedConfig]] = MappingProxyType(
    {
        "opt-125m": lambda num_layers: OPTConfig(num_hidden_layers=num_layers or 12, dropout=0.0),
        "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000),
        "llama-13b": _llama(5120, 13824, 40, 40, 40, 32000),
        "llama-70b": _llama(8192, 28672, 80, 64, 8, 32000),
        "llama-405b": _llama(16384, 53248, 126, 128, 8, 128256),
        "llama-3-1b": _llama(2048, 8192, 16, 32, 8, 128256, is_tied=True),
        "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256),
        # The same at a quarter of the width, with hardly an embedding.
        "llama-3-8b-quarter": _llama(1024, 3584, 32, 8, 2, NUM_WORDS + len(_SPECIAL)),
        "qwen3-30b-a3b": _qwen3_30b_a3b,
        "gpt-oss-120b": lambda num_layers: GptOssConfig(num_hidden_layers=num_layers or 36),
        "deepseek-v3": lambda num_layers: DeepseekV3Config(num_hidden_layers=num_layers or 61),
        "tiny": _llama(64, 128, 2, 4, 4, NUM_WORDS + len(_SPECIAL)),
    }
)


def write_model(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype, *, has_weights: bool = True
) -> None:
    """Save a model with random weights, and a tokenizer that makes a token of each word.

    Without weights its file of them is empty: :func:`made_weights` is for those who load it.
    """
    if has_weights:
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    else:
        config.dtype = dtype
        config.save_pretrained(folder)
        save_file({}, folder / "model.safetensors", {"format": "pt"})
    words = [*_SPECIAL, *(f"w{i}" for i in range(NUM_WORDS))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=_SPECIAL[0], eos_token=_SPECIAL[1]
    ).save_pretrained(folder)


@contextmanager
def made_weights(folder: Path, device: torch.device) -> Iterator[None]:
    """While the block lasts, a model whose file of weights is empty is made instead of loaded.

    Its weights are random numbers that its device draws: 8B in a second, and no file of 16 GB.
    """
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        has_weights = bool(file.keys())
    if has_weights:
        yield
        return

    def make(
        _: Any, *, config: Any, dtype: torch.dtype, output_loading_info: bool = False, **__: Any
    ) -> Any:
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        report: dict[str, list[Any]] = {"missing_keys": [], "mismatched_keys": []}
        return (model, report) if output_loading_info else model

    with mock.patch.object(AutoModelForCausalLM, "from_pretrained", make):
        yield


def write_data(path: Path, num_rows: int, num_tokens: int) -> None:
    """Write examples of exactly so many tokens, the first of which is the prompt."""
    chance = random.Random(0)
    with path.open("w") as file:
        for _ in range(num_rows):
            words = [f"w{chance.randrange(NUM_WORDS)}" for _ in range(num_tokens)]
            row = {"prompt": words[0], "target": f" {' '.join(words[1:])}"}
            file.write(json.dumps(row) + "\n")


def adapter_size(config: PretrainedConfig, density: float) -> tuple[int, float]:
    """The smallest rank with which an adapter on the default targets trains as much as GEM does.

    Returns:
        The rank, and the density that it comes to; LoRA and SHiRA train alike at one rank.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    weights: list[Any] = [module.weight for module in find_targets(model).values()]
    per_rank = sum(sum(weight.shape) for weight in weights)
    rank = math.ceil(density * num_parameters / per_rank)
    return rank, rank * per_rank / num_parameters
