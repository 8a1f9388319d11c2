"""What the tests need of vLLM: its loaders' narrowing, its workers and the calls to them.

The names, signatures and orders are vLLM's 0.29 (`LLM.collective_rpc`, `reset_prefix_cache`,
`WorkerWrapperBase.init_worker`, `Worker.get_model`; weights merged, cut by rows or columns, key
heads repeated, the vocabulary padded, experts stacked). It answers nothing; where vLLM is installed
`tests/serving/test_vllm.py` asks its own classes.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from gem_ds import VllmDeltas


def narrowed(whole: Tensor, dim: int, rank: int, size: int) -> Tensor:
    return whole.narrow(dim, rank * size, size)


class ShardedLlama(nn.Module):
    """The weights of a LlamaForCausalLM as one rank of vLLM has them."""

    MERGED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | {
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
    }

    def __init__(self, config: Any, rank: int, world_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.rank, self.world_size = config, rank, world_size
        self.q_size = config.num_attention_heads // world_size * config.head_dim
        self.kv_size = max(1, config.num_key_value_heads // world_size) * config.head_dim
        self.replicas = max(1, world_size // config.num_key_value_heads)
        hidden, inner = config.hidden_size, config.intermediate_size // world_size
        vocabulary = -(-config.vocab_size // (4 * world_size)) * 4  # padded, per rank
        shapes = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
        if config.tie_word_embeddings:
            del shapes["lm_head"]
        for i in range(config.num_hidden_layers):
            prefix = f"model.layers.{i}"
            shapes |= {
                f"{prefix}.self_attn.qkv_proj": (self.q_size + 2 * self.kv_size, hidden),
                f"{prefix}.self_attn.o_proj": (hidden, self.q_size),
                f"{prefix}.mlp.gate_up_proj": (2 * inner, hidden),
                f"{prefix}.mlp.down_proj": (hidden, inner),
                f"{prefix}.input_layernorm": (hidden,),
                f"{prefix}.post_attention_layernorm": (hidden,),
            }
            shapes |= self.shapes_of_experts(prefix)
        shapes["model.norm"] = (hidden,)
        self.weights = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(torch.zeros(shape, dtype=dtype))
                for name, shape in shapes.items()
            }
        )

    def shapes_of_experts(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Beside the dense block, which a mixture does without."""
        return {}

    def load_weights(self, weights: Any) -> set[str]:
        loaded = set()
        for name, whole in weights:
            module = name.removesuffix(".weight")
            if module == "lm_head" and self.config.tie_word_embeddings:
                continue
            parent, _, part = module.rpartition(".")
            if part in self.MERGED:
                module = f"{parent}.{self.MERGED[part]}"
            self._load(self.weights[module.replace(".", "/")], part, whole)
            loaded.add(module)
        return loaded

    def _load(self, param: Any, part: str, loaded_weight: Tensor) -> None:
        size = param.shape[0]
        if part in ("q_proj", "k_proj", "v_proj"):
            offset = {"q": 0, "k": self.q_size, "v": self.q_size + self.kv_size}[part[0]]
            size = self.q_size if part[0] == "q" else self.kv_size
            shard = self.rank if part[0] == "q" else self.rank // self.replicas
            target = param.data.narrow(0, offset, size)
            target.copy_(narrowed(loaded_weight, 0, shard, size))
        elif part in ("gate_proj", "up_proj"):
            target = param.data.narrow(0, size // 2 * (part == "up_proj"), size // 2)
            target.copy_(narrowed(loaded_weight, 0, self.rank, size // 2))
        elif part in ("o_proj", "down_proj"):
            param.data.copy_(narrowed(loaded_weight, 1, self.rank, param.shape[1]))
        elif part in ("embed_tokens", "lm_head"):
            first = min(self.rank * size, loaded_weight.shape[0])
            rows = loaded_weight.narrow(0, first, min(size, loaded_weight.shape[0] - first))
            param[: rows.shape[0]].data.copy_(rows)
            param[rows.shape[0] :].data.fill_(0)
        else:
            assert param.size() == loaded_weight.size()
            param.data.copy_(loaded_weight)


class ShardedMixture(ShardedLlama):
    """The weights of a Qwen3MoeForCausalLM as one rank of vLLM has them."""

    def shapes_of_experts(self, prefix: str) -> dict[str, tuple[int, ...]]:
        hidden, number = self.config.hidden_size, self.config.num_experts
        inner = self.config.moe_intermediate_size // self.world_size
        return {
            f"{prefix}.self_attn.q_norm": (self.config.head_dim,),
            f"{prefix}.self_attn.k_norm": (self.config.head_dim,),
            f"{prefix}.mlp.gate": (number, hidden),
            f"{prefix}.mlp.experts.w13": (number, 2 * inner, hidden),
            f"{prefix}.mlp.experts.w2": (number, hidden, inner),
        }

    def load_weights(self, weights: Any) -> set[str]:
        loaded = set()
        for name, whole in weights:
            prefix, is_expert, rest = name.partition(".experts.")
            if not is_expert:
                loaded |= super().load_weights([(name, whole)])
                continue
            number, part, _ = rest.split(".")
            module = f"{prefix}.experts.{'w2' if part == 'down_proj' else 'w13'}"
            weight = self.weights[module.replace(".", "/")]
            self._load(weight[int(number)], part, whole)
            loaded.add(module)
        return loaded


class Worker:
    """One process of the engine."""

    def __init__(self, model: nn.Module, rank: int) -> None:
        self.model_runner = SimpleNamespace(model=model)
        self.rank = rank

    def get_model(self) -> nn.Module:
        return self.model_runner.model


def extended(worker_extension_cls: str) -> type[Worker]:
    """The worker class with vLLM's checks of an extension."""
    module, _, name = worker_extension_cls.rpartition(".")
    extension = getattr(__import__(module, fromlist=[name]), name)
    for attr in dir(extension):
        assert attr.startswith("__") or not hasattr(Worker, attr)
    return type("ExtendedWorker", (Worker, extension), {})


class LLM:
    """Workers over one model's weights; ``running`` is whether requests are."""

    def __init__(
        self,
        hf_model: PreTrainedModel,
        world_size: int,
        worker_extension_cls: str = VllmDeltas.WORKER,
    ) -> None:
        config, dtype = hf_model.config, next(hf_model.parameters()).dtype
        worker_class = extended(worker_extension_cls)
        sharded = ShardedMixture if hasattr(config, "num_experts") else ShardedLlama
        self.workers = [
            worker_class(sharded(config, rank, world_size, dtype), rank)
            for rank in range(world_size)
        ]
        self.running = False
        self.cached: list[str] = []  # what was computed for prefixes and images
        self.llm_engine = SimpleNamespace(reset_encoder_cache=lambda: self._forget("image"))
        self.load(hf_model)

    def load(self, hf_model: PreTrainedModel) -> None:
        with TemporaryDirectory() as folder:
            hf_model.save_pretrained(folder)
            checkpoint = load_file(Path(folder, "model.safetensors"))
        for worker in self.workers:
            worker.get_model().load_weights(list(checkpoint.items()))

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple = (), kwargs: Any = None
    ) -> list[Any]:
        assert all(arg is None or isinstance(arg, str) for arg in args), "orders, not data"
        return [getattr(worker, method)(*args, **(kwargs or {})) for worker in self.workers]

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        return not self.running and self._forget("prefix")

    def _forget(self, kind: str) -> bool:
        self.cached = [each for each in self.cached if each != kind]
        return True
