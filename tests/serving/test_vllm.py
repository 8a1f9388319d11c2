"""vLLM's own classes, where it is installed; elsewhere this is skipped.

Its model, its loaders and its worker, in as many processes as there are ranks. Models load on a
CPU too, with operators that are named and never called, so vLLM's package for GPUs is enough.
"""

import os
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gem_ds import VllmDeltas, apply_delta
from gem_ds.files.delta import Delta
from gem_ds.serving.messages import check_parts
from tests.deltas import bits, make_delta
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 70, "num_hidden_layers": 2}
OPERATORS = (
    "silu_and_mul(Tensor(a!) result, Tensor input) -> ()",
    "rms_norm(Tensor(a!) result, Tensor input, Tensor weight, float eps) -> ()",
    "fused_add_rms_norm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps) -> ()",
    "rotary_embedding(Tensor positions, Tensor(a!) query, Tensor(b!)? key, int head_size, "
    "Tensor cos_sin_cache, bool is_neox) -> ()",
)


def on_a_cpu() -> Any:
    """VLLM as on a machine without accelerators; returns the library that names operators."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    library = torch.library.Library("_C", "FRAGMENT")
    for operator in OPERATORS:
        if not hasattr(torch.ops._C, operator.partition("(")[0]):
            library.define(operator)
    return library


def load_vllm(folder: Path, base: LlamaForCausalLM) -> Any:
    """The base as this rank of vLLM has it."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.llama import LlamaForCausalLM as VllmLlama
    from vllm.utils.torch_utils import set_default_torch_dtype

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    options = {"skip_tokenizer_init": True, "dtype": "bfloat16", "enforce_eager": True}
    config = EngineArgs(model=str(folder), **options).create_engine_config()
    config.parallel_config.tensor_parallel_size = world_size
    config.parallel_config.world_size = world_size
    address = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        init_distributed_environment(world_size, rank, address, rank, backend="gloo")
        initialize_model_parallel(world_size)
        model = VllmLlama(vllm_config=config)
    model.load_weights(list(base.state_dict().items()))
    return model


def swap_on_a_rank(folder: Path, path: Path, parts: Path) -> list[bool]:
    """What holds: nothing was changed by adding, the trained weights stood, the base is back."""
    library = on_a_cpu()
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.worker.worker_base import WorkerBase

    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = load_vllm(folder, base)
    extension = resolve_obj_by_qualname(VllmDeltas.WORKER)
    assert not [a for a in dir(extension) if a[:2] != "__" and hasattr(WorkerBase, a)]
    worker_class = type("Worker", (WorkerBase, extension), {"get_model": lambda self: model})
    worker: Any = worker_class.__new__(worker_class)
    worker.rank = int(os.environ["RANK"])
    before = bits(model)
    assert worker.gem_add_delta("a", str(path), str(parts)) is None
    found = [bits(model) == before]
    assert worker.gem_use_delta("a") is None
    trained = bits(model)
    assert worker.gem_use_delta(None) is None
    found.append(bits(model) == before)
    apply_delta(base, Delta.load(path))
    model.load_weights(list(base.state_dict().items()))
    del library
    return [*found, bits(model) == trained, trained != before]


@pytest.mark.parametrize(("world_size", "key_heads", "tied"), [(1, 2, True), (2, 1, False)])
def test_a_delta_in_vllm_is_what_loading_the_trained_weights_gives(
    tmp_path, world_size, key_heads, tied
):
    config = LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=key_heads, tie_word_embeddings=tied
    )
    base = LlamaForCausalLM(config).bfloat16()
    base.save_pretrained(tmp_path / "base")
    draw = random.Random(0)
    chosen = {
        name: sorted(draw.sample(range(weight.numel()), weight.numel() // 3))
        for name, weight in base.named_parameters()
    }
    delta = make_delta(base, chosen)
    delta.save(tmp_path / "delta.safetensors")
    (tmp_path / "parts").mkdir()
    arguments = (tmp_path / "base", tmp_path / "delta.safetensors", tmp_path / "parts")
    assert run_ranks(world_size, swap_on_a_rank, *arguments) == [[True] * 4] * world_size
    check_parts(delta.mask, [path.read_bytes() for path in (tmp_path / "parts").iterdir()])
