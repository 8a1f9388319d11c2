"""Which weights ZeRO-3 has gathered when, as DeepSpeed 0.19 was seen to do it.

A module's weights are gathered when it runs, forward or backward, and let go when it has run. When
any module starts, those that come next are gathered ahead, ``stage3_prefetch_bucket_size`` entries
or a little more each time, until ``stage3_max_live_parameters`` are there. A weight that several
modules share stays between their forward passes. Weights of at most
``stage3_param_persistence_threshold`` entries are never let go.

What comes next is known from the order of the step before, so a first pass records the order and a
second one counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from launch.planning.live import LiveBytes


class Gathers:
    """The gathered weights of a model, as its modules run.

    Args:
        model: whole, on the meta device.
        persistence_threshold: entries of the largest weight that stays.
        prefetch_size: entries that are gathered ahead when a module starts.
        max_live: entries up to which weights are gathered ahead.
        copies: whether a message is received into a copy, as gloo does it.

    Attributes:
        num_bytes: gathered in the last step, each weight as often as it was.
    """

    KIND = "gathered weights"

    def __init__(
        self,
        model: nn.Module,
        *,
        persistence_threshold: int,
        prefetch_size: int,
        max_live: int,
        copies: bool,
    ) -> None:
        self.prefetch_size, self.max_live = prefetch_size, max_live
        self.copies = copies
        self.num_bytes = 0
        self._weights = {
            module: [
                parameter
                for parameter in module.parameters(recurse=False)
                if parameter.numel() > persistence_threshold
            ]
            for module in model.modules()
        }
        self._order: list[nn.Module] = []  # of the step before
        self._runs: list[nn.Module] = []  # of this step
        self._to_come: Counter[Tensor] = Counter()  # forward passes that will use a weight
        self._held: set[Tensor] = set()
        self._live = LiveBytes()

    @property
    def knows_order(self) -> bool:
        """Whether a step has run, so that the next one gathers ahead."""
        return bool(self._runs)

    @contextmanager
    def step(self, live: LiveBytes) -> Iterator[None]:
        """Within the block, one forward and backward pass, whose gathers ``live`` counts."""
        self._live, self._order, self._runs, self.num_bytes = live, self._runs, [], 0
        handles = []
        for module, weights in self._weights.items():
            self._to_come.update(weights)
            handles.append(module.register_forward_pre_hook(lambda m, _: self._start(m)))
            handles.append(module.register_forward_hook(self._after_forward))
        yield
        for handle in handles:
            handle.remove()
        for weight in list(self._held):
            self._release(weight)
        self._to_come.clear()

    def _after_forward(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Let the weights go, and be there again when the gradient of the output arrives."""
        self._to_come.subtract(self._weights[module])
        self._end(module)
        output, read = _first_with_gradient(outputs), _first_with_gradient(inputs)
        if output is not None and output.grad_fn is not None:
            # A node's hook runs after those of the tensor, so the module above has ended.
            output.grad_fn.register_prehook(lambda _: self._start(module))
        if read is not None:
            read.register_hook(lambda _: self._end(module))

    def _start(self, module: nn.Module) -> None:
        self._runs.append(module)
        for weight in self._weights[module]:
            self._gather(weight)
        left = min(self.prefetch_size, self.max_live - sum(w.numel() for w in self._held))
        for coming in self._order[len(self._runs) :]:
            for weight in self._weights[coming]:
                if left <= 0:
                    return
                if weight not in self._held:
                    left -= weight.numel()
                    self._gather(weight)

    def _end(self, module: nn.Module) -> None:
        for weight in self._weights[module]:
            if weight in self._held and self._to_come[weight] <= 0:
                self._release(weight)

    def _gather(self, weight: Tensor) -> None:
        if weight not in self._held:
            self._held.add(weight)
            self.num_bytes += weight.nbytes
            self._live.add(self.KIND, weight.nbytes)
            with self._live.held("messages", weight.nbytes * self.copies):
                pass

    def _release(self, weight: Tensor) -> None:
        self._held.remove(weight)
        self._live.add(self.KIND, -weight.nbytes)


def _first_with_gradient(values: Any) -> Tensor | None:
    """The first tensor, of arguments or results, that a gradient will arrive at."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
    return next((tensor for tensor in tensors if tensor.requires_grad), None)
