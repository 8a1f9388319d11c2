"""A device with streams, recorded on a CPU: whether ZeRO-3's gathers wait for writes.

DeepSpeed gathers weights on a stream of its own where a device has streams; there a gather may read
a partition before the main stream has written it, unless the one was told to wait for the other.
:class:`Streams` gives an engine two streams that only note down who waits for whom, and sees every
operation that writes a partition or reads one for a gather.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gem_ds.distributed.engine import BaseEngine


class _Stream:
    """Work in it is in order; of another's work it knows when it has waited for that."""

    def __init__(self, streams: "Streams") -> None:
        self.streams = streams

    def wait_stream(self, other: "_Stream") -> None:
        if self is self.streams.gathers and other is self.streams.main:
            self.streams.num_waits += 1
            self.streams.written.clear()

    def synchronize(self) -> None:
        """Everything is done at once here."""


class Streams(TorchDispatchMode):
    """While the block lasts, an engine at stage 3 believes that its device has streams.

    Attributes:
        num_waits: of the gathers' stream for the main one.
        num_gathers: reads of partitions in the gathers' stream.
        unordered: weights that were gathered after a write and no wait for it.
    """

    def __init__(self, engine: BaseEngine) -> None:
        super().__init__()
        self.main, self.gathers = _Stream(self), _Stream(self)
        self.current = self.main
        self.named: dict[str, Any] = dict(engine.model.named_parameters())
        self.offload = engine._engine.optimizer.parameter_offload
        self.num_waits = self.num_gathers = 0
        self.written: set[str] = set()
        self.unordered: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> "Streams":
        from deepspeed.accelerator import get_accelerator  # noqa: TID251

        coordinator = self.offload.get_param_coordinator()
        for owner, name, value in (
            (self.offload, "_DeepSpeedZeRoOffload__allgather_stream", self.gathers),
            (coordinator, "_PartitionedParameterCoordinator__allgather_stream", self.gathers),
            (get_accelerator(), "stream", self._in_stream),
            (get_accelerator(), "current_stream", lambda *_: self.current),
        ):
            self._stack.enter_context(mock.patch.object(owner, name, value))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @contextmanager
    def _in_stream(self, stream: _Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:
            return func(*args, **(kwargs or {}))
        if self.current is self.gathers:
            read = self._partitions_in((args, kwargs))
            self.num_gathers += len(read)
            self.unordered += read & self.written
        result = func(*args, **(kwargs or {}))
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[place] if place < len(args) else (kwargs or {}).get(argument.name)
                if self.current is self.main:
                    self.written |= self._partitions_in(value)
        return result

    def _partitions_in(self, tree: Any) -> set[str]:
        """The weights of whose partition in this process a tensor has entries."""
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.nbytes]
        found = set()
        for name, parameter in self.named.items():
            start = parameter.ds_tensor.data_ptr()
            stop = start + parameter.ds_tensor.nbytes
            if any(low < stop and start < high for low, high in ranges):
                found.add(name)
        return found
