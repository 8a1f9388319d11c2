"""What one rank runs, on the meta device: the model, what of it is trained, and a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from gem_ds.data.dataset import answer_positions
from gem_ds.models.blocks import enable_checkpointing, model_of
from gem_ds.models.encoders import head_names, is_encoder, num_positions
from gem_ds.models.load import DTYPES
from gem_ds.models.loss import chunked_answer_loss, plain_output_layer, summed_answer_loss
from gem_ds.planning.live import LiveBytes, flash_attention
from gem_ds.sddmm import choose_kernel
from gem_ds.sddmm.memory import picking_bytes, strips_bytes, temporary_bytes
from gem_ds.select.rules import RULES, SPARSE_METHODS
from gem_ds.sparse.entries import WholeSink
from gem_ds.sparse.kinds import ExpertsLayer
from gem_ds.sparse.layers import NoGradient, Sink, TargetLayer
from gem_ds.sparse.target_layers import TargetLayers
from gem_ds.sparse.used_inputs import keep_copies
from gem_ds.train.config import Arguments
from gem_ds.train.dense_tuning import trained_network
from gem_ds.train.sparse_tuning import sparse_layers
from gem_ds.train.targets import Targets

_ATTENTION = "planned"
AttentionInterface.register(_ATTENTION, flash_attention)
AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A training command, and the ranks that are to run it."""

    args: Arguments
    config: PretrainedConfig
    deepspeed: Mapping[str, Any]  # the JSON, as read
    world_size: int
    on_cpu: bool = False
    usable_bytes: float = 0.0  # of a GPU, of which --calibration_buffer_gb auto takes a part


class Subject:
    """A model with what a method trains of it, ready to run a micro-batch.

    Sequences are as long as ``--max_length`` allows, and every token of them carries loss, so this
    is the most that a micro-batch can need.
    """

    def __init__(self, setting: Setting, targets: Targets) -> None:
        args, config = setting.args, setting.config
        self.args, self.on_cpu = args, setting.on_cpu
        self.num_tokens: int = min(args.data.max_length, num_positions(config) or 10**9)
        options = {"dtype": DTYPES[args.train.dtype]}
        model = model_of(config, trust_remote_code=args.model.trust_remote_code, **options)
        with torch.device("meta"):
            if model._supports_attention_backend:  # others have attention of their own
                model.set_attn_implementation(_ATTENTION)
            if args.train.gradient_checkpointing:
                enable_checkpointing(model)
            head = sorted(head_names(model))
            parts: tuple[TargetLayers | None, TargetLayers | None] = None, None
            if args.method.method in SPARSE_METHODS:
                parts = sparse_layers(model, targets, head)
            else:
                model = trained_network(model, args, targets, head)
        self.model = model.train()
        self.layers, self.head_layers = parts
        vectors = [part.vector for part in parts if part is not None]
        values = {id(vector.values) for vector in vectors}
        self.weights = [p for p in model.parameters() if id(p) not in values]
        self.trained = [p for p in self.weights if p.requires_grad]  # none with a sparse method
        self.num_selected = targets.budget if vectors else 0
        self.num_trained = sum(p.numel() for p in self.trained)  # of all with optimizer state
        self.num_trained += sum(vector.num_entries for vector in vectors)
        # A run tries how to compute the loss of a text, in a forward pass.
        self.tries_loss = not is_encoder(config) and plain_output_layer(model) is not None
        self._loss = self._answer_loss() if not is_encoder(config) else _summed_logits

    def step(self, live: LiveBytes) -> None:
        """Run the last micro-batch of a step, forward and backward."""
        sinks, head = self._sinks(), self.head_layers
        # The place in the head's vector changes no size, and biases are few.
        whole = [WholeSink(layer, head.vector, 0, None) for layer in head] if head else []
        batch_size = self.args.train.per_device_train_batch_size
        self._run(live, sinks, whole, batch_size, delivers=True)

    @cached_property
    def counts(self) -> list[int]:
        """Selected entries of each layer: as its rule shares them if scores go by the sizes."""
        if self.layers is None:
            return []
        sizes = [layer.numel for layer in self.layers]
        return RULES[self.args.method.method].share(sizes, sizes, self.num_selected)

    @property
    def num_written_by_index(self) -> int:
        """Selected entries of the layers that are not selected as a whole."""
        pairs = zip(self.layers or (), self.counts, strict=True)
        return sum(count for layer, count in pairs if count < layer.numel)

    @cached_property
    def num_used(self) -> list[int | None]:
        """Inputs of each layer that its entries read, if spread evenly; None where all are kept."""
        layers = self.layers or ()
        sizes = [(layer.num_inputs, n) for layer, n in zip(layers, self.counts, strict=True)]
        used = [math.ceil(size * (1 - (1 - 1 / max(1, size)) ** n)) for size, n in sizes]
        copied = keep_copies(layers, used)
        return [n if is_copied else None for n, is_copied in zip(used, copied, strict=True)]

    @property
    def strips_bytes(self) -> int:
        """What a kernel of strips keeps of the entries, besides their indices."""
        num_bytes = 0
        for layer, count, used in zip(self.layers or (), self.counts, self.num_used, strict=True):
            if isinstance(layer, ExpertsLayer):  # whose strips are found anew
                continue
            rows, columns = layer.shape
            if used is not None:
                rows, columns = (rows, used) if layer.input_dim == 1 else (used, columns)
            if self._kernel(layer.dtype, (rows, columns), count) == "triton":
                num_bytes += strips_bytes((rows, columns), count)
        return num_bytes

    def _kernel(self, dtype: torch.dtype, shape: tuple[int, int], num_entries: int) -> str:
        name: str = self.args.method.sddmm_kernel
        if name == "auto":
            name = choose_kernel("cpu" if self.on_cpu else "cuda", dtype, shape, num_entries)
        return name

    def _sinks(self) -> list[Sink]:
        """Sinks that hold what the kernels would."""
        sinks: list[Any] = []
        for count, num_used in zip(self.counts, self.num_used, strict=True):
            sinks.append(partial(self._hold, count))
            if num_used is not None:
                sinks[-1].inputs = torch.empty(num_used, dtype=torch.int64, device="meta")
        return sinks

    def calibrate(
        self,
        live: LiveBytes,
        take: Callable[[TargetLayer, Tensor], None],
        *,
        one_by_one: bool = False,
    ) -> None:
        """Run a micro-batch of calibration; ``take`` gets each layer and the ``dy`` of it."""
        assert self.layers is not None, "nothing is calibrated"
        sinks = [lambda dy, *_, layer=layer: take(layer, dy) for layer in self.layers]
        batch_size = 1 if one_by_one else self.args.train.per_device_train_batch_size
        self._run(
            live, sinks, [NoGradient()] * len(self.head_layers or ()), batch_size, delivers=False
        )

    @torch.no_grad()
    def evaluate(self, live: LiveBytes) -> None:
        """Run a batch of held-out examples, forward."""
        self.model.eval()
        self._loss_of(self.args.train.per_device_eval_batch_size, live)
        self.model.train()

    def _run(
        self,
        live: LiveBytes,
        sinks: Sequence[Sink],
        head_sinks: Sequence[Sink],
        batch_size: int,
        *,
        delivers: bool,
    ) -> None:
        with ExitStack() as stack:
            for layers, own in ((self.layers, sinks), (self.head_layers, head_sinks)):
                if layers is not None:
                    layers.vector.delivers = delivers
                    stack.enter_context(layers.sinks(own))
            stack.enter_context(live)
            self._loss_of(batch_size, live).backward()

    def _loss_of(self, batch_size: int, live: LiveBytes) -> Tensor:
        shape = (batch_size, self.num_tokens)
        positions = answer_positions(torch.zeros(shape, dtype=torch.int64))
        with live:
            ids = torch.zeros(shape, dtype=torch.int64, device="meta")
            batch = {
                "input_ids": ids,
                "attention_mask": ids,
                "labels": ids,
                "answer_positions": positions.to("meta"),
            }
            return self._loss(self.model, batch)

    @torch.no_grad()
    def _answer_loss(self) -> Callable[..., Tensor]:
        """As :func:`gem_ds.models.loss.answer_loss_of`, which compares numbers; here are none."""
        layer = plain_output_layer(self.model)
        if layer is None:
            return summed_answer_loss
        outputs: list[Tensor] = []
        hook = layer.register_forward_hook(lambda *call: outputs.append(call[-1]))
        ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
        logits = self.model(input_ids=ids, attention_mask=ids, use_cache=False).logits
        hook.remove()
        is_same = [id(output) for output in outputs] == [id(logits)]
        if not is_same:
            return summed_answer_loss
        return partial(chunked_answer_loss, device_type="cpu" if self.on_cpu else "cuda")

    def _hold(self, num_entries: int, dy: Tensor, x: Tensor, ends: Tensor | None = None) -> None:
        """A sink that holds what the kernel would, and the vector's buffer."""
        assert self.layers is not None
        self.layers.vector.gradient(0, num_entries, dy.device)
        groups = 1 if ends is None else len(ends)
        rows, columns = dy.shape[1], x.shape[1]
        if groups > 1 and not self.on_cpu:
            num_bytes = picking_bytes(groups * rows * columns, num_entries, dy.element_size())
            if num_entries == groups * rows * columns and self.args.method.sddmm_kernel == "auto":
                is_made = dy.dtype == torch.bfloat16  # fp32 is added while it is computed
                num_bytes = dy.element_size() * num_entries * is_made  # the product, which is added
            torch.empty(num_bytes, dtype=torch.uint8, device=dy.device)
            return
        num_entries //= groups  # of experts one at a time
        num_bytes = temporary_bytes(
            self._kernel(dy.dtype, (rows, columns), num_entries),
            tokens=dy.shape[0],
            shape=(rows, columns),
            num_entries=num_entries,
            itemsize=dy.element_size(),
            on_cpu=self.on_cpu,
        )
        torch.empty(num_bytes, dtype=torch.uint8, device=dy.device)


def _summed_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Stands for the loss of an encoder's head, which is small."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits: Tensor = model(**inputs).logits
    return logits.float().sum()
