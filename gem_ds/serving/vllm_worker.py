"""What each of vLLM's workers can do with deltas; vLLM mixes the class into its own by name.

    vllm serve M --worker-extension-cls gem_ds.serving.vllm_worker.DeltaWorker

``collective_rpc`` calls the methods in all workers at once, and is to carry orders and no data:
deltas come in files that every worker can read, and values of training over a socket. A method
returns None, or a sentence on why nothing was done: of an exception vLLM tells only that it was.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from gem_ds.files.delta import Delta
from gem_ds.serving.delta_set import DeltaSet
from gem_ds.serving.messages import DeltaReceiver, pack_base
from gem_ds.serving.through_loader import swaps_through_loader

_TIMEOUT = 1800  # seconds that a worker waits for its trainer


def _told(method: Callable[..., None]) -> Callable[..., str | None]:
    """The method, with what it refuses as what it returns."""

    @functools.wraps(method)
    def telling(self: Any, *args: Any) -> str | None:
        try:
            method(self, *args)
        except (ValueError, OSError) as error:
            return str(error) or type(error).__name__
        return None

    return telling


class DeltaWorker:
    """Deltas in the part of the model that a worker holds.

    Names start with ``gem_``, as vLLM refuses those that its worker has already.
    """

    @_told
    def gem_add_delta(self, name: str, path: str, folder: str) -> None:
        """Take a delta from a file up, and write what is here of its base into the folder."""
        swaps = self._gem_deltas().add(name, Delta.load(path))
        Path(folder, f"{cast(Any, self).rank}.safetensors").write_bytes(pack_base(swaps))

    @_told
    def gem_refuse_taken(self, name: str) -> None:
        """Refuse the name of a delta that is here."""
        if name in self._gem_deltas().names:
            raise ValueError(f"there is a delta {name!r} already: remove it, or name this another")

    @_told
    def gem_use_delta(self, name: str | None = None) -> None:
        """Put a delta into the weights, or the base; the caller sees to vLLM's caches."""
        self._gem_deltas().use(name)

    @_told
    def gem_remove_delta(self, name: str) -> None:
        """Forget a delta; one that is not there is no error, as other workers may have it."""
        if name in self._gem_deltas().names:
            self._gem_deltas().remove(name)

    @_told
    def gem_connect(self, host: str, port: str) -> None:
        """Connect to a trainer that listens there (`gem_ds.serving.sync`)."""
        vars(self)["_gem_receiver"] = DeltaReceiver(
            self._gem_deltas(), socket.create_connection((host, int(port)), _TIMEOUT)
        )

    @_told
    def gem_receive(self) -> None:
        """Take one message of the trainer, and answer it."""
        if "_gem_receiver" not in vars(self):
            raise ValueError("no trainer is connected: call gem_connect first")
        vars(self)["_gem_receiver"].receive()

    @_told
    def gem_disconnect(self) -> None:
        """End the connection; the base's weights are back."""
        if "_gem_receiver" in vars(self):
            vars(self).pop("_gem_receiver").close()

    def _gem_deltas(self) -> DeltaSet:
        if "_gem_set" not in vars(self):
            model = cast(Any, self).get_model()
            vars(self)["_gem_set"] = DeltaSet(model, swaps_through_loader)
        return cast(DeltaSet, vars(self)["_gem_set"])
