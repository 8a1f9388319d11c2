"""Small random models in engines, and examples without text: what tests of runs on ranks share.

A model is made anew wherever it is needed, always with the same weights, so that ranks and the
dense reference agree on them without a file.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)

from gem_ds.data.batches import Batches
from gem_ds.data.dataset import Dataset
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.engine import Engine, FlatVector
from gem_ds.distributed.optim import SparseAdamW
from gem_ds.distributed.weights import numel
from gem_ds.distributed.zero_config import RunShape, read_config, resolve_config
from gem_ds.models.blocks import block_sizes, enable_checkpointing
from gem_ds.models.loss import chunked_answer_loss
from gem_ds.models.targets import find_targets
from gem_ds.sparse.target_layers import TargetLayers
from tests import oracle
from tests.largest_tensor import LargestTensor

DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
PAD_TOKEN_ID = 0
MAX_LENGTH = 24
_VOCABULARY = 40

Tensors = dict[str, Tensor]
CONFIGS = yaml.safe_load(Path(__file__).with_name("tiny_models.yaml").read_text(encoding="utf-8"))
DROPOUTS = {
    "opt": ("dropout", "attention_dropout"),
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
}


def tiny_config(name: str, **more: Any) -> PretrainedConfig:
    """A configuration of tiny_models.yaml."""
    values = {"model_type": name} | CONFIGS[name] | more
    return AutoConfig.for_model(**values)


def model_of(config: PretrainedConfig, make: Any = AutoModelForCausalLM.from_config) -> Any:
    """A model of random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(config)


def make_model(
    architecture: str, dtype: torch.dtype = torch.float32, dropout: float = 0.3, **more: Any
) -> PreTrainedModel:
    """One of tiny_models.yaml; all but Llama drop out in train mode."""
    rates = dict.fromkeys(DROPOUTS.get(architecture, ()), dropout)
    auto_class = AutoModelForMaskedLM if architecture == "bert" else AutoModelForCausalLM
    config = tiny_config(architecture, **rates, **more)
    model: PreTrainedModel = model_of(config, auto_class.from_config)
    return model.to(dtype)


class Matrices(nn.Module):
    """Given weights, each a linear layer that is a target."""

    def __init__(self, weights: Tensors) -> None:
        super().__init__()
        for name, weight in weights.items():
            rows, columns = weight.shape
            layer = nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
            layer.weight.data.copy_(weight)
            self.add_module(name, layer)
        self.targets = {f"{name}.weight": layer for name, layer in self.named_children()}


def checkpointed(model: PreTrainedModel) -> PreTrainedModel:
    """The model with gradient checkpointing turned on, as launch/train.py does it."""
    enable_checkpointing(model)
    return model


def random_examples(count: int) -> Dataset:
    """Examples of 2 to 13 random tokens; prompt and answer have at least one each."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 14, (count,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    prompts = (torch.rand(count, generator=generator) * (lengths - 1)).floor().int() + 1
    tokens = torch.randint(1, _VOCABULARY, (int(offsets[-1]),), generator=generator)
    return Dataset(
        tokens=tokens.int(),
        offsets=offsets,
        groups=torch.arange(count + 1),
        prompt_lengths=prompts,
        truncated=torch.zeros(count, dtype=torch.bool),
    )


def make_batches(
    dataset: Dataset, comm: Comm, micro_batch_size: int, accumulation: int = 1
) -> Batches:
    """Global batches of so many micro-batches on each rank."""
    return Batches(
        dataset,
        comm,
        global_batch_size=accumulation * micro_batch_size * comm.world_size,
        micro_batch_size=micro_batch_size,
        seed=0,
        pad_token_id=PAD_TOKEN_ID,
    )


# The loss of a run, and the same written naively for the oracle.


def summed_loss_of(architecture: str) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """The loss that a run on the architecture is given."""
    return _summed_masked_loss if architecture == "bert" else chunked_answer_loss


def _summed_masked_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A masked language model's: the labels stand where they are predicted."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits.flatten(0, 1)
    return F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")


Example = tuple[Tensor, int]
"""The token ids of an example and how many of them are the prompt's."""


def naive_examples(dataset: Dataset, indices: Sequence[int]) -> list[Example]:
    """Examples one by one, without batch, padding or mask."""
    assert dataset.prompt_lengths is not None
    tokens = dataset.tokens.long().split(dataset.lengths.tolist())
    return [(tokens[i], int(dataset.prompt_lengths[i])) for i in indices]


def naive_loss(model: nn.Module, example: Example) -> Tensor:
    """Summed loss over the answer of a single example."""
    tokens, prompt_length = example
    logits = model(input_ids=tokens[None]).logits[0]
    if not isinstance(model, BertForMaskedLM):
        logits = torch.cat([logits[:1], logits[:-1]])  # what predicts token t is at t - 1
    return F.cross_entropy(logits[prompt_length:], tokens[prompt_length:], reduction="sum")


def naive_gradients(
    model: nn.Module, num_examples: int, *of_each: Callable[[Tensor], Tensor]
) -> tuple[Tensors, Tensors]:
    """The oracle's gradients of the targets over so many random examples, and the weights."""
    names = list(find_targets(model))
    examples = naive_examples(random_examples(num_examples), range(num_examples))
    gradients = oracle.summed_gradients(model.eval(), examples, naive_loss, names, *of_each)
    return gradients, {name: model.get_parameter(name).detach() for name in names}


def max_error(gradients: Tensors, expected: Tensors) -> float:
    """The largest error of a matrix, relative to its largest entry."""
    return max(
        float((gradients[name].flatten() - g.flatten()).abs().max() / g.abs().max())
        for name, g in expected.items()
    )


# Engines


@dataclass(frozen=True)
class Setting:
    """A kind of engine: one of the bundled files, varied.

    The variants are plain, offload (optimizer and, of stage 3, parameters on the CPU), gathered (no
    weight is persistent) and persistent (all are); the last two are of stage 3.
    """

    stage: int
    dtype: str = "fp32"  # or bf16
    variant: str = "plain"

    def __str__(self) -> str:
        return f"zero{self.stage} {self.dtype} {self.variant}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the model."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    def config(
        self, world_size: int, max_grad_norm: float, num_selected: int, blocks: dict[str, int]
    ) -> dict[str, Any]:
        """The resolved DeepSpeed configuration; blocks are gathered whole."""
        offloads = self.variant == "offload"
        suffix = "_offload" if offloads and self.stage == 3 else ""
        config = read_config(DS_CONFIGS / f"zero{self.stage}{suffix}.json")
        if offloads and self.stage < 3:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        threshold = {"gathered": 0, "persistent": 10**9}.get(self.variant)
        if threshold is not None:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
        shape = RunShape(
            world_size=world_size,
            micro_batch_size=1,
            gradient_accumulation_steps=1,
            max_grad_norm=max_grad_norm,
            dtype=self.dtype,  # type: ignore[arg-type]
            hidden_size=20,
            num_selected=num_selected,
            blocks=blocks,
        )
        return resolve_config(config, shape)


def make_engine(
    setting: Setting,
    comm: Comm,
    model: nn.Module,
    num_selected: int,
    *,
    targets: dict[str, nn.Module] | None = None,
) -> tuple[Engine, TargetLayers]:
    """Put a model into an engine, its query and value projections (or ``targets``) as targets."""
    layers = TargetLayers(model, targets or find_targets(model), num_selected)
    config = setting.config(comm.world_size, 1.0, num_selected, block_sizes(model))
    optimizer = functools.partial(SparseAdamW, lr=0.01)
    return Engine(model, [layers.vector], optimizer, config, comm), layers


def whole_state(engine: Engine, vector: FlatVector | None = None) -> Tensors:
    """Masters and moments, which rank 0 alone gets, on every rank; no other made room for them."""
    with LargestTensor() as made:
        state = engine.get_state(vector)
    if not engine.comm.is_main:
        assert state == {}
        size = numel((vector or engine.vectors[0]).values)
        assert made.total_entries < 3 * size + 64, "its own parts, not those of others"
    told: Tensors = engine.comm.broadcast_object(state)
    return {key: values.clone() for key, values in told.items()}  # perhaps the engine's own


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers, so that -0.0 and 0.0 differ and NaN equals itself."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_selected_up_to_rounding(
    selected: Tensors, gradients: Tensors, weights: Tensors, total: int
) -> None:
    """The flat indices are the oracle's, but for entries whose scores differ by rounding only.

    A gradient is a sum that may cancel, so each of its entries is known to an error that is
    relative to the largest of them, and its ratio to that error over the entry's own weight.
    """
    assert sum(index.numel() for index in selected.values()) == total
    for name, expected in oracle.select(gradients, weights, total).items():
        ratio = oracle.ratio(gradients[name], weights[name]).flatten()
        error = 1e-6 * gradients[name].abs().max() / (weights[name].abs().flatten() + 1e-8)
        mask = torch.zeros_like(ratio, dtype=torch.bool)
        mask[selected[name].long()] = True
        wrong = mask != expected.flatten()
        if not expected.any():
            assert not mask.any(), f"{name} was to get nothing"
            continue
        threshold = ratio[expected.flatten()].min()
        slack = error + error[ratio == threshold].max()
        assert bool(((ratio - threshold).abs() <= slack)[wrong].all()), f"{name}: a clear miss"
        assert int(wrong.sum()) <= 2, f"{name}: {int(wrong.sum())} entries differ"
