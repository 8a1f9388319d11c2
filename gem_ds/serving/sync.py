r"""A trainer keeps models that generate at its own values, by the entries of a mask.

    transfer = gem_ds.DeltaTransfer(mask, "http://localhost:8000")
    trainer = AsyncGRPOTrainer(..., weight_transfer=transfer)

`DeltaTransfer` has the face of TRL's ``WeightTransferProtocol`` (1.16), for a server started with

    VLLM_SERVER_DEV_MODE=1 vllm serve M \
        --worker-extension-cls gem_ds.serving.vllm_worker.DeltaWorker

Where TRL's own client streams every weight, it sends the K values of the mask, once their indices
went (`gem_ds.serving.messages`). `DeltaSender` is the same without vLLM: receivers are any process
with a `DeltaReceiver`.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from gem_ds.files.delta import Delta
from gem_ds.files.mask import Mask
from gem_ds.serving.messages import Kind, check_parts, pack_values, receive, send
from gem_ds.serving.vllm_engine import VllmServer


class DeltaSender:
    """Sends to every receiver that has connected.

    Attributes:
        num_bytes: Of the payloads of all messages so far, to one receiver.
    """

    def __init__(
        self, mask: Mask, host: str = "127.0.0.1", port: int = 0, timeout: float = 1800
    ) -> None:
        """Listen at host and port (0: any that is free), for peers that answer in `timeout` s."""
        self._mask, self._timeout = mask, timeout
        self._listener = socket.create_server((host, port))
        self._listener.settimeout(timeout)
        self._receivers: list[socket.socket] = []
        self._number = 0
        self.num_bytes = 0

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to connect to."""
        return self._listener.getsockname()[:2]  # type: ignore[no-any-return]

    def start(self, num_receivers: int = 0) -> None:
        """Wait for so many more receivers, and send the mask to all; numbers start again.

        Raises:
            ValueError: A receiver has refused it, or they do not hold the mask's base.
            OSError: One did not come in time, or is gone.
        """
        for _ in range(num_receivers):
            connection, _ = self._listener.accept()
            connection.settimeout(self._timeout)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._receivers.append(connection)
        with tempfile.TemporaryDirectory() as folder:
            self._mask.save(Path(folder, "mask.safetensors"))
            payload = Path(folder, "mask.safetensors").read_bytes()
        self._number = 0
        check_parts(self._mask, self._exchange(Kind.MASK, payload))

    def send(self, values: Mapping[str, Tensor]) -> None:
        """Send the values [k_l] of every weight; all receivers have them when this returns.

        Raises:
            ValueError: Values do not fit the mask or are not finite (nothing is sent then), or a
                receiver has refused them: start again.
            OSError: A receiver is gone, and with it all connections: make another sender.
        """
        self._exchange(Kind.VALUES, pack_values(self._mask, values))

    def close(self) -> None:
        """End all connections; another thread that waits for an answer stops waiting."""
        for connection in (*self._receivers, self._listener):
            with suppress(OSError):  # it has ended already
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _exchange(self, kind: Kind, payload: bytes | bytearray) -> list[bytes]:
        """Send one message to all and take their answers."""
        try:
            for connection in self._receivers:
                send(connection, kind, self._number, payload)
            answers = [receive(connection) for connection in self._receivers]
        except (OSError, ValueError):  # an answer still under way would be taken for the next one
            self.close()
            raise
        self._number += 1
        self.num_bytes += len(payload)
        if refused := [bytes(text).decode() for told, _, text in answers if told != Kind.DONE]:
            raise ValueError(
                f"{len(refused)} of {len(answers)} receivers refused the weights: {refused[0]}"
            )
        return [bytes(answer) for *_, answer in answers]


class DeltaTransfer:
    """TRL's ``WeightTransferProtocol`` for a vLLM server, by the entries of a mask."""

    def __init__(
        self, mask: Mask, server_url: str, *, host: str = "127.0.0.1", timeout: float = 1800
    ) -> None:
        """`host` is this machine's address as the server's workers reach it; `timeout` in s."""
        self._mask, self._host, self._timeout = mask, host, timeout
        self._server = VllmServer(server_url, timeout=timeout)
        self._sender: DeltaSender | None = None

    @property
    def num_bytes(self) -> int:
        """Of the payloads of all messages so far, to one worker."""
        return 0 if self._sender is None else self._sender.num_bytes

    def init_weight_transfer(self) -> None:
        """Connect the server's workers and send them the mask; raises as `DeltaSender.start`."""
        self._sender = sender = DeltaSender(self._mask, self._host, timeout=self._timeout)
        host, port = sender.address
        try:
            self._server.call("gem_connect", host, str(port))
            self._while_received(sender.start, self._server.world_size())
        except (ValueError, OSError):
            with suppress(ValueError, OSError):  # what is told is what went wrong first
                self.destroy()
            raise

    def pause(self) -> None:
        """Hold the server's requests, before weights change."""
        self._server.pause(mode="keep")

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Send the mask's entries of the weights that come by name; raises as `DeltaSender.send`.

        Every weight is drawn, as that can be a collective operation of the trainer's ranks.
        """
        if self._sender is None:
            raise ValueError("the transfer has not begun: call init_weight_transfer first")
        values = {}
        for name, weight in iterator:
            if name in self._mask.indices:
                index = self._mask.indices[name].to(weight.device, torch.int64)
                values[name] = weight.detach().reshape(-1)[index].cpu()
        if missing := self._mask.indices.keys() - values.keys():
            raise ValueError(
                f"the trainer sends no weight {min(missing)!r}, of which the mask has entries: "
                "pass the mask of this model"
            )
        Delta(mask=self._mask, values=values)  # which refuses them while no worker waits
        self._while_received(self._sender.send, values)

    def resume(self) -> None:
        """Let the server's requests go on."""
        self._server.resume()

    def destroy(self) -> None:
        """End the connections; the server has the base's weights again."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None
            self._server.call("gem_disconnect")

    def _while_received(self, send: Callable[..., None], *args: object) -> None:
        """Send while the workers receive; what either of them refuses is raised."""
        assert self._sender is not None
        with ThreadPoolExecutor(1) as threads:
            sending = threads.submit(send, *args)
            try:
                self._server.call("gem_receive")
            except Exception:
                self._sender.close()  # or it would wait for answers
                raise
            sending.result()
