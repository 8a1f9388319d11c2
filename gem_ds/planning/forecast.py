"""What one rank will hold and what crosses the network, before anything is loaded.

What lasts follows from sizes: weights, statistics, values, masters and moments. What comes and goes
(activations, gradients, gathered weights, a kernel's buffers) is counted while the model runs a
micro-batch on the meta device (:mod:`gem_ds.planning.live`). Not counted is what libraries take:
the CUDA context, NCCL's buffers, the allocator's fragments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gem_ds.calibration.gradients import auto_buffer_gb, buffered_layers
from gem_ds.distributed.zero_config import zero_stage
from gem_ds.models.load import DTYPES
from gem_ds.planning.gathers import Gathers
from gem_ds.planning.live import LiveBytes
from gem_ds.planning.subject import Setting, Subject
from gem_ds.select.rules import CALIBRATED_METHODS, RULES
from gem_ds.sparse.kinds import ExpertsLayer
from gem_ds.sparse.layers import TargetLayer
from gem_ds.train.prepare import resolve_deepspeed
from gem_ds.train.targets import settle_targets

_FP32, _INT64 = 4, 8  # bytes of a number


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one rank needs, in bytes; of the rank that needs most.

    ``training``, ``calibration`` (empty where there is none) and ``evaluation`` tell by kind what
    is held at the moment when most is.
    """

    num_parameters: int
    num_trained: int  # numbers with optimizer state, over all ranks
    num_tokens: int  # of a sequence
    training: Mapping[str, int]
    calibration: Mapping[str, int]
    evaluation: Mapping[str, int]
    state: int  # masters and moments, summed over the ranks; at stage 0 each has all
    weight_gathers: int  # messages of a micro-batch that gather weights; each once, whole
    num_gathers: int  # how many these are
    step_messages: int  # all others of a step
    calibration_messages: int  # of a calibration's micro-batch, the gathers left out
    buffer_gb: float  # 10^9 bytes that whole gradients may take in calibration

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        phases = self.training, self.calibration, self.evaluation
        return max(sum(held.values()) for held in phases)


def forecast(setting: Setting) -> Forecast:
    """Foretell what a training will need; a ``ValueError`` says what the trainer would refuse."""
    targets = settle_targets(setting.args, setting.config, None)
    train, written = setting.args.train, dict(setting.deepspeed)
    deepspeed = resolve_deepspeed(written, train, setting.config, targets, setting.world_size)
    subject = Subject(setting, targets)
    rank = _Rank(setting, deepspeed, subject)
    gathers = rank.make_gathers()
    training = rank.run(rank.step, gathers)
    sent = (0, 0) if gathers is None else (gathers.num_bytes, gathers.num_messages)
    calibration, calibration_messages = rank.calibration(gathers)
    return Forecast(
        num_parameters=targets.num_parameters,
        num_trained=subject.num_trained,
        num_tokens=subject.num_tokens,
        training=training,
        calibration=calibration,
        evaluation=rank.run(subject.evaluate, rank.make_gathers(), steps=False),
        state=3 * _FP32 * subject.num_trained * (rank.world_size if rank.stage == 0 else 1),
        weight_gathers=sent[0],
        num_gathers=sent[1],
        step_messages=rank.step_messages(),
        calibration_messages=calibration_messages,
        buffer_gb=rank.buffer_gb(),
    )


class _Rank:
    """One rank of a setting."""

    def __init__(self, setting: Setting, deepspeed: Mapping[str, Any], subject: Subject) -> None:
        self.method, self.subject = setting.args.method, subject
        self.world_size, self.on_cpu = setting.world_size, setting.on_cpu
        self.usable_bytes = setting.usable_bytes
        self.looks_ahead = bool(setting.args.train.sam_rho)
        self.zero = deepspeed["zero_optimization"]
        self.stage = zero_stage(deepspeed)
        self.itemsize: int = subject.weights[0].element_size()
        self.offloads_weights = is_offloaded(self.zero, "offload_param")
        self.is_sparse = subject.layers is not None
        sent_as = deepspeed.get("communication_data_type")
        self.message_itemsize: int = DTYPES[sent_as].itemsize if sent_as else self.itemsize

    def part(self, num_entries: int) -> int:
        """Entries of a vector that this rank holds where the ranks share it."""
        return -(-num_entries // self.world_size)

    def lasting(self) -> Counter[str]:
        """Bytes of what stands throughout: weights, and what follows the number of trained ones."""
        numels = [weight.numel() for weight in self.subject.weights]
        total = self.subject.num_trained
        held = Counter(weights=self.itemsize * sum(numels))
        if self.stage == 3:
            threshold = self.zero["stage3_param_persistence_threshold"]
            shards = sum(map(self.part, numels)) * (not self.offloads_weights)
            copies = sum(n for n in numels if n <= threshold) * (self.world_size > 1)
            held["weights"] = self.itemsize * (shards + copies)
        own = total if self.stage == 0 else self.part(total)
        words = 2 if self.stage == 0 and self.itemsize == _FP32 else 3  # masters may be the weights
        if not is_offloaded(self.zero, "offload_optimizer"):
            held["masters and moments"] = _FP32 * words * own
        if self.is_sparse:
            held["selected values"] = self.itemsize * (total if self.stage < 3 else own)
            copied = zip(self.subject.counts, self.subject.num_used, strict=True)
            by_index = self.subject.num_written_by_index
            by_index = by_index if self.stage < 3 else self.part(by_index)
            held["indices"] = _FP32 * total + _INT64 * by_index
            held["indices"] += _FP32 * sum(count for count, used in copied if used is not None)
            held["indices"] += self.subject.strips_bytes
            if self.on_cpu:  # what a GPU's host keeps: the values before
                held["indices"] += self.itemsize * self.part(self.subject.num_selected)
        elif self.stage >= 2:
            held["gradients"] = self.itemsize * own
        return held

    def run(
        self,
        act: Callable[[LiveBytes], None],
        gathers: Gathers | None,
        *,
        steps: bool = True,
        statistics: int = 0,
    ) -> Mapping[str, int]:
        """What a rank holds at the peak of a micro-batch, which ``act`` runs.

        A step follows if ``steps``; bytes of ``statistics`` are held beside what always lasts.
        """
        for _ in range(1 if gathers is None or gathers.knows_order else 2):
            self.subject.model.zero_grad()
            live = LiveBytes()
            live.know(self.subject.model)
            for kind, num_bytes in (self.lasting() + Counter(statistics=statistics)).items():
                live.add(kind, num_bytes)
            with ExitStack() as stack:
                if gathers is not None:
                    stack.enter_context(gathers.step(live))
                if steps:
                    self.reduce(live, stack)
                act(live)
            if steps:
                self.take_step(live)
        return live.at_peak

    def step(self, live: LiveBytes) -> None:
        """Run the last micro-batch of a step; SAM's is at weights that it has moved."""
        if self.looks_ahead and self.stage == 3:  # below, the values before stand anyway
            live.add("selected values", self.itemsize * self.subject.num_trained)
        self.subject.step(live)

    def make_gathers(self) -> Gathers | None:
        """Weights are gathered at stage 3, from several ranks or from where they are offloaded."""
        if self.stage < 3 or (self.world_size == 1 and not self.offloads_weights):
            return None
        copies = self.on_cpu and self.world_size > 1
        is_preceded = self.subject.tries_loss
        return Gathers(self.subject.model, self.zero, copies=copies, is_preceded=is_preceded)

    def reduce(self, live: LiveBytes, stack: ExitStack) -> None:
        """Until the stack ends, gradients of trained weights leave when they have been sent."""
        if self.stage >= 2:
            for weight in self.subject.trained:
                handle = weight.register_post_accumulate_grad_hook(_drop_gradient)
                stack.callback(handle.remove)
        if self.stage >= 1:
            bucket = min(self.zero["reduce_bucket_size"], self.subject.num_trained)
            buckets = 2 if self.zero.get("overlap_comm", self.stage == 3) else 1
            live.add("messages", self.message_itemsize * bucket * buckets)

    def take_step(self, live: LiveBytes) -> None:
        """What the optimizer's step holds beside what lasts."""
        total = self.subject.num_trained
        if self.stage >= 1:
            live.add("gradients", _FP32 * self.part(total))
            return
        if self.world_size > 1:  # gradients are copied into messages of DeepSpeed's own size
            live.add("messages", self.message_itemsize * min(total, 500_000_000))
        if self.itemsize < _FP32:
            live.add("gradients", _FP32 * total)

    def buffer_gb(self) -> float:
        """What calibration has for whole gradients."""
        if (given := self.method.fixed_buffer_gb) is not None:
            return given
        free = self.usable_bytes - self.lasting().total()
        return auto_buffer_gb(free, [self.part(layer.numel) for layer in self.subject.layers or ()])

    def calibration(self, gathers: Gathers | None) -> tuple[Mapping[str, int], int]:
        """What is held at the peak of a micro-batch of calibration, and what it sends."""
        layers = self.subject.layers
        if self.method.method not in CALIBRATED_METHODS or layers is None:
            return {}, 0
        parts = [self.part(layer.numel) for layer in layers]
        buffered = buffered_layers(parts, self.world_size, self.buffer_gb())
        names = {layers[i].name for i in buffered}
        is_by_example = RULES[self.method.method].is_by_example
        whole = sum(layer.numel for layer in layers if layer.name in names)
        shared = sum(self.part(layer.numel) for layer in layers if layer.name not in names)

        def act(live: LiveBytes) -> None:
            before = 0  # bytes of the product that is on its way

            def take(layer: TargetLayer, dy: Tensor) -> None:
                nonlocal before
                # Of experts a GPU makes it in their dtype and adds that (sddmm.grouped).
                is_grouped = isinstance(layer, ExpertsLayer) and dy.dtype == torch.bfloat16
                grouped = dy.element_size() * layer.numel * (is_grouped and not self.on_cpu)
                if layer.name in names:  # a buffer of gem_ds.calibration.gradients
                    with live.held("products", _FP32 * layer.numel * is_by_example + grouped):
                        return
                size = _FP32 * self.world_size * self.part(layer.numel)
                live.add("products", size)
                with live.held("products", grouped):
                    pass
                with live.held("messages", size * self.on_cpu):  # gloo copies what it sends
                    live.add("products", -before)
                before = size

            self.subject.calibrate(live, take, one_by_one=is_by_example)

        messages = _FP32 * self.world_size * shared * (self.world_size > 1)
        return self.run(act, gathers, statistics=_FP32 * (whole + shared)), messages

    def step_messages(self) -> int:
        """Gradients; and at stages 1 and 2, or of sparse values, what each rank has updated."""
        total: int = self.subject.num_trained
        has_values = self.stage in (1, 2) or (self.stage == 3 and self.is_sparse)
        values = self.itemsize * total * (has_values and self.world_size > 1)
        return self.message_itemsize * total + values


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def is_offloaded(zero: Mapping[str, Any], what: str) -> bool:
    """Whether the host holds what a section of DeepSpeed's configuration names."""
    return bool(zero.get(what, {}).get("device", "none") == "cpu")
