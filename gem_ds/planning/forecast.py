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

from torch import Tensor
from transformers import PretrainedConfig

from gem_ds.distributed.zero_config import zero_stage
from gem_ds.models.load import DTYPES
from gem_ds.planning.gathers import Gathers
from gem_ds.planning.live import LiveBytes
from gem_ds.planning.subject import Subject
from gem_ds.select.rules import CALIBRATED_METHODS, SPARSE_METHODS
from gem_ds.sparse.gradients import buffered_layers
from gem_ds.sparse.layers import TargetLayer
from gem_ds.train.config import Arguments
from gem_ds.train.prepare import resolve_deepspeed
from gem_ds.train.targets import settle_targets

_FP32 = 4  # bytes of a number
#: DeepSpeed's own where the JSON is silent.
_ALLREDUCE_SIZE = 500_000_000


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A training command, and the ranks that are to run it.

    Attributes:
        args: the flags.
        config: the model's.
        deepspeed: the DeepSpeed JSON, as read.
        world_size: the ranks.
        on_cpu: whether they run on CPUs.
    """

    args: Arguments
    config: PretrainedConfig
    deepspeed: Mapping[str, Any]
    world_size: int
    on_cpu: bool = False


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one rank needs, in bytes; of the rank that needs most.

    Attributes:
        num_parameters: N.
        num_trained: numbers with optimizer state, over all ranks.
        num_tokens: of a sequence.
        training: by kind, at the moment of a step when most is held.
        calibration: the same of calibration; empty where there is none.
        evaluation: the same of a batch of held-out examples.
        state: masters and moments, summed over the ranks; at stage 0 each has all.
        weight_gathers: messages of a micro-batch that gather weights; each message once, whole.
        step_messages: all others of a step.
        calibration_messages: of a calibration's micro-batch, the gathers left out.
    """

    num_parameters: int
    num_trained: int
    num_tokens: int
    training: Mapping[str, int]
    calibration: Mapping[str, int]
    evaluation: Mapping[str, int]
    state: int
    weight_gathers: int
    step_messages: int
    calibration_messages: int

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        phases = self.training, self.calibration, self.evaluation
        return max(sum(held.values()) for held in phases)


def forecast(setting: Setting) -> Forecast:
    """Foretell what a training will need.

    Raises:
        ValueError: the trainer would refuse the setting; in one sentence.
    """
    targets = settle_targets(setting.args, setting.config, None)
    train, written = setting.args.train, dict(setting.deepspeed)
    deepspeed = resolve_deepspeed(
        written, train, setting.config, targets.budget, setting.world_size
    )
    subject = Subject(setting.args, setting.config, targets, on_cpu=setting.on_cpu)
    rank = _Rank(setting, deepspeed, subject)
    training = rank.run(subject.step, rank.lasting())
    weight_gathers = 0 if rank.gathers is None else rank.gathers.num_bytes
    calibration: Mapping[str, int] = {}
    calibration_messages = 0
    if setting.args.method.method in CALIBRATED_METHODS:
        calibration, calibration_messages = rank.calibration()
    return Forecast(
        num_parameters=targets.num_parameters,
        num_trained=subject.num_trained,
        num_tokens=subject.num_tokens,
        training=training,
        calibration=calibration,
        evaluation=rank.evaluation(),
        state=3 * _FP32 * subject.num_trained * (rank.world_size if rank.stage == 0 else 1),
        weight_gathers=weight_gathers,
        step_messages=rank.step_messages(),
        calibration_messages=calibration_messages,
    )


class _Rank:
    """One rank of a setting."""

    def __init__(self, setting: Setting, deepspeed: Mapping[str, Any], subject: Subject) -> None:
        self.setting, self.subject = setting, subject
        self.world_size, self.on_cpu = setting.world_size, setting.on_cpu
        self.zero = deepspeed["zero_optimization"]
        self.stage = zero_stage(deepspeed)
        self.itemsize: int = subject.weights[0].element_size()
        self.offloads_weights = is_offloaded(self.zero, "offload_param")
        #: entries of the largest weight that ZeRO-3 keeps whole
        self.threshold: int = self.zero.get("stage3_param_persistence_threshold", 100_000)
        self.is_sparse = setting.args.method.method in SPARSE_METHODS
        sent_as = deepspeed.get("communication_data_type")
        self.message_itemsize: int = DTYPES[sent_as].itemsize if sent_as else self.itemsize
        self.gathers = self.make_gathers()

    def part(self, num_entries: int) -> int:
        """Entries of a vector that this rank holds where the ranks share it."""
        return -(-num_entries // self.world_size)

    # What lasts

    def lasting(self) -> Counter[str]:
        """Bytes of what stands throughout training."""
        return self.weights() + self.trained()

    def weights(self) -> Counter[str]:
        """The frozen and trained weights, and the copies of small ones at stage 3."""
        numels = [weight.numel() for weight in self.subject.weights]
        if self.stage < 3:
            return Counter({"weights": self.itemsize * sum(numels)})
        shards = sum(map(self.part, numels))
        copies = sum(n for n in numels if n <= self.threshold)
        on_device = shards * (not self.offloads_weights) + copies * (self.world_size > 1)
        return Counter({"weights": self.itemsize * on_device})

    def trained(self) -> Counter[str]:
        """Masters, moments and what else follows the number of trained values."""
        total = self.subject.num_trained
        own = total if self.stage == 0 else self.part(total)
        words = 2 if self.stage == 0 and self.itemsize == _FP32 else 3  # masters may be the weights
        if is_offloaded(self.zero, "offload_optimizer"):
            words = 0
        held = Counter({"masters and moments": _FP32 * words * own})
        if self.is_sparse:
            held["selected values"] = self.itemsize * (total if self.stage < 3 else own)
            held["indices"] = _FP32 * total
            if self.on_cpu:  # what a GPU's host keeps: the values before, the mask
                held["indices"] += (self.itemsize + _FP32) * self.subject.num_selected
        elif self.stage >= 2:
            held["gradients"] = self.itemsize * own
        return held

    # What comes and goes

    def run(
        self, act: Callable[[LiveBytes], None], lasting: Mapping[str, int], *, steps: bool = True
    ) -> Mapping[str, int]:
        """Let the subject run a micro-batch; returns what a rank holds at the peak of it.

        ``act`` runs it, while the bytes of ``lasting`` are held; a step follows if ``steps``.
        """
        knows_order = self.gathers is None or self.gathers.knows_order
        for _ in range(1 if knows_order else 2):
            self.subject.release()
            live = LiveBytes()
            live.know(self.subject.model)
            for kind, num_bytes in lasting.items():
                live.add(kind, num_bytes)
            with ExitStack() as stack:
                if self.gathers is not None:
                    stack.enter_context(self.gathers.step(live))
                if steps:
                    self.reduce(live, stack)
                act(live)
            if steps:
                self.take_step(live)
        return live.at_peak

    def make_gathers(self) -> Gathers | None:
        """Weights are gathered at stage 3, from several ranks or from where they are offloaded."""
        if self.stage < 3 or (self.world_size == 1 and not self.offloads_weights):
            return None
        return Gathers(
            self.subject.model,
            persistence_threshold=self.threshold,
            prefetch_size=self.zero.get("stage3_prefetch_bucket_size", 50_000_000),
            max_live=int(self.zero.get("stage3_max_live_parameters", 1e9)),
            copies=self.on_cpu and self.world_size > 1,
        )

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
        if self.world_size > 1:  # gradients are copied into a message
            live.add("messages", self.message_itemsize * min(total, _ALLREDUCE_SIZE))
        if self.itemsize < _FP32:
            live.add("gradients", _FP32 * total)

    def evaluation(self) -> Mapping[str, int]:
        """What is held at the peak of a batch of held-out examples."""
        self.gathers = self.make_gathers()  # the order is that of a forward pass alone
        return self.run(self.subject.evaluate, self.lasting(), steps=False)

    def calibration(self) -> tuple[Mapping[str, int], int]:
        """What is held at the peak of a micro-batch of calibration, and what it sends."""
        layers = self.subject.layers
        assert layers is not None
        parts = [self.part(layer.numel) for layer in layers]
        buffer_gb = self.setting.args.method.calibration_buffer_gb
        buffered = {layers[i].name for i in buffered_layers(parts, self.world_size, buffer_gb)}
        whole = sum(layer.numel for layer in layers if layer.name in buffered)
        shared = sum(self.part(layer.numel) for layer in layers if layer.name not in buffered)
        lasting = self.lasting() + Counter({"statistics": _FP32 * (whole + shared)})
        live = LiveBytes()
        before = 0  # bytes of the product that is on its way

        def take(layer: TargetLayer, dy: Tensor) -> None:
            nonlocal before
            if layer.name in buffered:
                adds_product = self.itemsize < _FP32 and not self.on_cpu
                with live.held("products", _FP32 * layer.numel * adds_product):
                    return  # gem_ds.sparse.sddmm.add_product
            size = _FP32 * self.world_size * self.part(layer.numel)
            live.add("products", size)
            with live.held("messages", size * self.on_cpu):  # gloo copies what it sends
                live.add("products", -before)
            before = size

        def act(current: LiveBytes) -> None:
            nonlocal live, before
            live, before = current, 0
            self.subject.calibrate(live, take)

        messages = _FP32 * self.world_size * shared * (self.world_size > 1)
        return self.run(act, lasting), messages

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
