"""Which weights ZeRO-3 has gathered when, as DeepSpeed 0.19 was seen to do it.

A module's weights are gathered when it runs, forward or backward, and let go when it has run; of a
leaf module (:mod:`gem_ds.distributed.zero_gathers`) those of all that is in it. When any module
starts, those that come next are gathered ahead, ``stage3_prefetch_bucket_size`` entries or a little
more each time, until ``stage3_max_live_parameters`` are there. Several weights are one message, of
which each is copied out when the first is needed, so that for a moment they are there twice. A
weight that several modules share stays between their forward passes, and between their backward
passes. From a forward to a backward pass stays what runs to come use before
``stage3_max_reuse_distance`` entries of others (leaves have none, for a weight outside of them).
Weights of at most ``stage3_param_persistence_threshold`` entries are never let go. A trained weight
whose block is recomputed in the backward pass stays until that has used it.

What comes next is a queue of the uses of weights, known from the step before; so a first pass
records their order and a second one counts. A use whose weight is there when its turn comes leaves
the queue, and is not gathered ahead though the weight may be let go before. What stays is decided
once, by the first order that is known: that of a forward pass alone, where one went before.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gem_ds.planning.live import LiveBytes


class Gathers:
    """The gathered weights of a model, as its modules run under a resolved ``zero_optimization``.

    If it ``copies``, a message is received into a copy, which stays until the weights are copied
    out, as gloo does it. ``is_preceded`` tells that a forward pass ran alone before.
    """

    KIND = "gathered weights"

    def __init__(
        self, model: nn.Module, zero: Mapping[str, Any], *, copies: bool, is_preceded: bool
    ) -> None:
        self._model, self.copies, self.is_preceded = model, copies, is_preceded
        self.num_bytes = 0  # gathered in the last step, each weight as often as it was
        self.num_messages = 0  # that it took
        self._prefetch_size: int = zero["stage3_prefetch_bucket_size"]
        self._max_live = int(zero.get("stage3_max_live_parameters", 1e9))
        self._max_reuse = int(zero.get("stage3_max_reuse_distance", 1e9))
        threshold = zero["stage3_param_persistence_threshold"]
        leaves = zero.get("leaf_module", {}).get("classes", ())
        self._weights = {
            module: [p for p in module.parameters(recurse=is_leaf) if p.numel() > threshold]
            for module, is_leaf in _running_modules(model, leaves)
        }
        self._leaves = {m for m in self._weights if type(m).__name__ in leaves}
        self._runs: list[nn.Module] = []  # of this step, forward and backward
        self._order: list[nn.Module] = []  # of the step before
        self._queue: deque[tuple[int, Tensor]] = deque()  # uses to come, by number of the run
        self._forwards: Counter[Tensor] = Counter()  # passes to come that will use a weight
        self._backwards: Counter[Tensor] = Counter()
        self._held: set[Tensor] = set()
        self._arriving: list[set[Tensor]] = []  # messages of several weights, not yet copied out

    @property
    def knows_order(self) -> bool:
        """Whether a step has run, so that the next one gathers ahead."""
        return bool(self._runs)

    @contextmanager
    def step(self, live: LiveBytes) -> Iterator[None]:
        """Within the block, one forward and backward pass, whose gathers ``live`` counts."""
        self._queue = deque((i, w) for i, run in enumerate(self._runs) for w in self._weights[run])
        self._order, self._runs = self._runs, []
        self._live, self.num_bytes, self.num_messages = live, 0, 0
        handles = []
        for module, weights in self._weights.items():
            self._forwards.update(weights)
            handles.append(module.register_forward_pre_hook(lambda m, _: self._start(m)))
            handles.append(module.register_forward_hook(self._after_forward))
        yield
        for handle in handles:
            handle.remove()
        self._release(self._held)
        self._arriving.clear()
        self._forwards.clear()
        self._backwards.clear()

    def _after_forward(self, module: Any, inputs: Any, outputs: Any) -> None:
        """Let the weights go, and be there again when the gradient of the output arrives."""
        weights = self._weights[module]
        is_recomputed = torch._C._current_graph_task_id() != -1  # within a backward pass
        staying: set[Tensor] = set()
        if is_recomputed:
            staying = {weight for weight in weights if weight.requires_grad}
        elif not self.is_preceded:
            staying = self._used_soon(module)
        self._end(self._forwards, weights, staying)
        if is_recomputed:
            return  # gradients pass through what the first forward made
        output, read = _first_with_gradient(outputs), _first_with_gradient(inputs)
        if output is not None and output.grad_fn is not None:
            self._backwards.update(weights)
            module.applied_pre_backward_ref_cnt = 1  # weights.skip_gather_in_backward
            # A node's hook runs after those of the tensor, so the module above has ended.
            output.grad_fn.register_prehook(lambda _: self._start_backward(module))
        if read is not None:
            read.register_hook(lambda _: self._end(self._backwards, weights))

    def _used_soon(self, module: nn.Module) -> set[Tensor]:
        """What stays when a module has run, since others are to use it soon, or it itself."""
        soon, size = set[Tensor](), 0
        if self._model not in self._runs:  # of its hooks, a step's order begins behind them
            return soon
        for run in self._order[len(self._runs) :]:
            if size >= self._max_reuse:
                break
            if module in self._leaves or run not in self._leaves:
                soon.update(self._weights[run])
                size += sum(weight.numel() for weight in self._weights[run])
        return soon

    def _start_backward(self, module: Any) -> None:
        if module.applied_pre_backward_ref_cnt:
            self._start(module)

    def _start(self, module: nn.Module) -> None:
        number = len(self._runs)
        self._runs.append(module)
        own = self._weights[module]
        self._gather([weight for weight in own if weight not in self._held])
        self._copy_out(own)
        while self._queue and self._queue[0][0] <= number:
            self._queue.popleft()
        left = min(self._prefetch_size, self._max_live - sum(w.numel() for w in self._held))
        ahead: dict[Tensor, None] = {}
        while self._queue and left > 0:
            _, weight = self._queue.popleft()
            if weight not in self._held and weight not in ahead:
                left -= weight.numel()
                ahead[weight] = None
        self._gather(list(ahead))

    def _gather(self, weights: list[Tensor]) -> None:
        """Gather weights that are not there, in one message."""
        if not weights:
            return
        size = sum(weight.nbytes for weight in weights)
        self._held.update(weights)
        self.num_bytes += size
        self.num_messages += 1
        self._live.add(self.KIND, size)
        with self._live.held("messages", size * self.copies):
            pass
        if len(weights) > 1:
            self._arriving.append(set(weights))

    def _copy_out(self, needed: list[nn.Parameter]) -> None:
        """Wait for the messages that hold these weights, which all are copied out of them then."""
        arrived = [message for message in self._arriving if not message.isdisjoint(needed)]
        self._arriving = [message for message in self._arriving if message.isdisjoint(needed)]
        for message in arrived:
            size = sum(weight.nbytes for weight in message)
            with self._live.held("messages", size * (1 + self.copies)):
                pass

    def _end(
        self,
        to_come: Counter[Tensor],
        weights: list[nn.Parameter],
        staying: Container[Tensor] = frozenset(),
    ) -> None:
        """A pass of a module has ended; others of the same direction may be to come."""
        to_come.subtract(weights)
        self._release(w for w in weights if to_come[w] <= 0 and w not in staying)

    def _release(self, weights: Iterable[Tensor]) -> None:
        for weight in self._held.intersection(weights):
            self._held.remove(weight)
            self._live.add(self.KIND, -weight.nbytes)


def _running_modules(module: nn.Module, leaves: Sequence[str]) -> Iterator[tuple[nn.Module, bool]]:
    """The modules whose runs gather weights, and which of them are leaves."""
    is_leaf = type(module).__name__ in leaves
    yield module, is_leaf
    for child in () if is_leaf else module.children():
        yield from _running_modules(child, leaves)


def _first_with_gradient(values: Any) -> Tensor | None:
    """The first tensor, of arguments or results, that a gradient will arrive at."""
    return next((v for v in tree_leaves(values) if isinstance(v, Tensor) and v.requires_grad), None)
