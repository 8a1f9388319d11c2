"""What one rank runs, on the meta device: the model, what of it is trained, and a micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from gem_ds.data.dataset import answer_positions
from gem_ds.models.encoders import auto_class, head_names, is_encoder, num_positions
from gem_ds.models.load import DTYPES, enable_checkpointing
from gem_ds.models.loss import chunked_answer_loss, plain_output_layer, summed_answer_loss
from gem_ds.planning.live import LiveBytes, flash_attention
from gem_ds.select.rules import SPARSE_METHODS
from gem_ds.sparse.entries import WholeSink
from gem_ds.sparse.layers import Sink, TargetLayer, TargetLayers, drop
from gem_ds.sparse.sddmm import choose_kernel
from gem_ds.sparse.sddmm.memory import temporary_bytes
from gem_ds.train.config import Arguments
from gem_ds.train.dense_tuning import trained_network
from gem_ds.train.sparse_tuning import sparse_layers
from gem_ds.train.targets import Targets

_ATTENTION = "planned"
AttentionInterface.register(_ATTENTION, flash_attention)
AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)


class Subject:
    """A model with what a method trains of it, ready to run a micro-batch.

    Sequences are as long as ``--max_length`` allows, and every token of them carries loss, so this
    is the most that a micro-batch can need.

    Args:
        args: the flags.
        config: the model's.
        targets: what of it the method changes.
        on_cpu: whether the run will be on a CPU.

    Attributes:
        model: the model, or peft's around it.
        weights: the frozen and trained parameters of the model, each once.
        trained: of these the ones that are trained themselves; none with a sparse method.
        num_selected: K; 0 with other methods.
        num_trained: numbers that have optimizer state, a head's included.
    """

    def __init__(
        self, args: Arguments, config: PretrainedConfig, targets: Targets, *, on_cpu: bool
    ) -> None:
        self.args, self.config, self.on_cpu = args, config, on_cpu
        with torch.device("meta"):
            model: Any = auto_class(config).from_config(
                config,
                dtype=DTYPES[args.train.dtype],
                trust_remote_code=args.model.trust_remote_code,
            )
            if model._supports_attention_backend:  # others have attention of their own
                model.set_attn_implementation(_ATTENTION)
            if args.train.gradient_checkpointing:
                enable_checkpointing(model)
            self.model = self._prepare(model, targets)
        self.model.train()
        vectors = [part.vector for part in (self.layers, self.head_layers) if part is not None]
        values = {id(vector.values) for vector in vectors}
        self.weights = [p for p in self.model.parameters() if id(p) not in values]
        self.trained = [p for p in self.weights if p.requires_grad]
        self.num_selected = targets.budget if self.layers is not None else 0
        self.num_trained = sum(p.numel() for p in self.trained)
        self.num_trained += sum(vector.num_entries for vector in vectors)
        self._loss = self._answer_loss() if not is_encoder(config) else _summed_logits

    def _prepare(self, model: Any, targets: Targets) -> Any:
        self.layers: TargetLayers | None = None
        self.head_layers: TargetLayers | None = None
        head = sorted(head_names(model))
        if self.args.method.method not in SPARSE_METHODS:
            return trained_network(model, self.args, targets, head)
        self.layers, self.head_layers = sparse_layers(model, targets, head)
        return model

    # Running

    def step(self, live: LiveBytes) -> None:
        """Run the last micro-batch of a step, forward and backward."""
        with ExitStack() as stack:
            if self.layers is not None:
                self.layers.vector.delivers = True
                stack.enter_context(self.layers.sinks(self._training_sinks(self.layers)))
            if (head := self.head_layers) is not None:
                head.vector.delivers = True
                # The place changes no size, and biases are few.
                sinks = [WholeSink(layer, head.vector, 0, None) for layer in head]
                stack.enter_context(head.sinks(sinks))
            self._run(live)

    def calibrate(self, live: LiveBytes, take: Callable[[TargetLayer, Tensor], None]) -> None:
        """Run a micro-batch of calibration.

        Args:
            live: counts.
            take: is told of each layer, when its gradient can be formed, and of its ``dy``.
        """
        assert self.layers is not None, "nothing is calibrated"
        parts = [part for part in (self.layers, self.head_layers) if part is not None]
        for part in parts:
            part.vector.delivers = False
        sinks = [lambda dy, x, layer=layer: take(layer, dy) for layer in self.layers]
        with ExitStack() as stack:
            stack.enter_context(self.layers.sinks(sinks))
            if (head := self.head_layers) is not None:
                stack.enter_context(head.sinks([drop] * len(head)))
            self._run(live)

    @torch.no_grad()
    def evaluate(self, live: LiveBytes) -> None:
        """Run a batch of held-out examples, forward."""
        self.model.eval()
        self._loss_of(self.args.train.per_device_eval_batch_size, live)
        self.model.train()

    def _run(self, live: LiveBytes) -> None:
        with live:
            self._loss_of(self.args.train.per_device_train_batch_size, live).backward()

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

    @property
    def num_tokens(self) -> int:
        """Tokens of a sequence."""
        return min(self.args.data.max_length, num_positions(self.config) or 10**9)

    def release(self) -> None:
        """Drop gradients."""
        self.model.zero_grad(set_to_none=True)

    # Details

    @torch.no_grad()
    def _answer_loss(self) -> Callable[..., Tensor]:
        """As :func:`models.loss.answer_loss_of`, which compares numbers; here there are none."""
        layer = plain_output_layer(self.model)
        if layer is None:
            return summed_answer_loss
        outputs: list[Tensor] = []
        hook = layer.register_forward_hook(lambda *call: outputs.append(call[-1]))
        ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
        logits = self.model(input_ids=ids, attention_mask=ids, use_cache=False).logits
        hook.remove()
        is_same = [id(output) for output in outputs] == [id(logits)]
        return chunked_answer_loss if is_same else summed_answer_loss

    def _training_sinks(self, layers: TargetLayers) -> list[Sink]:
        """Budgets are not known; each layer gets a share by its size."""
        available = sum(layer.numel for layer in layers)
        sinks: list[Sink] = []
        start = 0
        for layer in layers:
            stop = start + layers.vector.num_entries * layer.numel // available
            sinks.append(self._sink(layer, start, stop))
            start = stop
        return sinks

    def _sink(self, layer: TargetLayer, start: int, stop: int) -> Sink:
        """Holds what the kernel would, and the vector's buffer."""
        assert self.layers is not None
        vector, kernel = self.layers.vector, self.args.method.sddmm_kernel

        def sink(dy: Tensor, x: Tensor) -> None:
            vector.gradient(start, stop - start, dy.device)
            device = "cpu" if self.on_cpu else "cuda"
            name = (
                choose_kernel(device, dy.dtype, layer.shape, stop - start)
                if kernel == "auto"
                else kernel
            )
            num_bytes = temporary_bytes(
                name,
                tokens=dy.shape[0],
                shape=layer.shape,
                num_entries=stop - start,
                itemsize=dy.element_size(),
                on_cpu=self.on_cpu,
            )
            torch.empty(num_bytes, dtype=torch.uint8, device=dy.device)

        return sink


def _summed_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Stands for the loss of an encoder's head, which is small."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits: Tensor = model(**inputs).logits
    return logits.float().sum()
