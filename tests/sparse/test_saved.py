"""What a forward pass of a Llama-8B block saves for its backward pass, counted on the meta device.

With DeepSpeed's own linear function in the place of torch's, as ZeRO-3 puts it there.
"""

from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import gem_ds.planning.subject  # noqa: F401 - its attention keeps what a fused one would
from gem_ds.models.targets import find_targets
from gem_ds.sparse.target_layers import TargetLayers

pytestmark = pytest.mark.slow  # imports DeepSpeed

TOKENS = 64
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def _saved(method: str, num_layers: int) -> float:
    """KiB for each token, parameters left out and each storage counted once."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap  # noqa: TID251

    config = LlamaConfig(**LLAMA_8B, vocab_size=64, num_hidden_layers=num_layers)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM._from_config(config, attn_implementation="planned")
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    model.to(torch.bfloat16)
    if method == "gem":
        layers = TargetLayers(model, find_targets(model), 10)
        layers.renew_anchor()
    else:
        adapter = LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
        get_peft_model(model, adapter, autocast_adapter_dtype=False)
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with mock.patch.object(F, "linear", zero3_linear_wrap), hooks:
        states = model.model(input_ids=ids, attention_mask=ids, use_cache=False)
    assert states.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in storages.values()) / TOKENS / 1024


def test_frozen_layers_save_none_of_their_input():
    """Per layer 16 KiB of norms' outputs less than LoRA, 16 of their inputs, 28 of a product."""
    gem, lora = (_saved(method, 3) - _saved(method, 2) for method in ("gem", "lora"))
    assert gem <= 121
    assert lora >= 180
