"""Deltas in a running vLLM (0.29 and up): put in, swapped and taken out while it stays loaded.

    llm = vllm.LLM(model=M, dtype="bfloat16", worker_extension_cls=gem_ds.VllmDeltas.WORKER)
    deltas = gem_ds.VllmDeltas(llm)  # or of a server's address: "http://localhost:8000"
    deltas.add("gsm8k", gem_ds.Delta.load("runs/gsm8k/delta.safetensors"))
    deltas.use("gsm8k")
    deltas.use(None)

Every worker finds through its model's own loader where a delta's entries are in its part
(`gem_ds.serving.through_loader`), so tensor and pipeline parallelism and merged weights need no
knowledge here. vLLM's ``checkpoint_weight_patch`` stages every weight whole at each swap, keeps no
base values, and does not notice entries that a loader passes over.
"""

from __future__ import annotations

import json
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gem_ds.files.delta import Delta
from gem_ds.serving.messages import check_parts


class VllmLlm:
    """Orders to a ``vllm.LLM`` in this process."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def call(self, method: str, *args: str | None) -> None:
        """Call a method of `DeltaWorker` in every worker; a ValueError if one refuses."""
        _check_answers(self._llm.collective_rpc(method, args=args))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While the block lasts nothing is generated, and nothing computed before is kept."""
        if not self._llm.reset_prefix_cache():
            raise ValueError("vLLM still answers requests: swap deltas when they are done")
        self._llm.llm_engine.reset_encoder_cache()
        yield


class VllmServer:
    """Orders to ``vllm serve``, started with VLLM_SERVER_DEV_MODE=1."""

    def __init__(self, url: str, timeout: float = 1800) -> None:
        self._url, self._timeout = url.rstrip("/"), timeout

    def call(self, method: str, *args: str | None) -> None:
        """Call a method of `DeltaWorker` in every worker; a ValueError if one refuses."""
        _check_answers(self._ask("/collective_rpc", {"method": method, "args": args})["results"])

    def world_size(self) -> int:
        """Number of workers."""
        return int(self._ask("/get_world_size")["world_size"])

    def pause(self, mode: str = "wait") -> None:
        """Let requests end ("wait") or stand ("keep"), and drop what was computed for prefixes."""
        self._ask(f"/pause?mode={mode}", {})

    def resume(self) -> None:
        """Go on."""
        self._ask("/resume", {})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While the block lasts nothing is generated, and nothing computed before is kept."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def _ask(self, path: str, body: object = None) -> Any:
        request = urllib.request.Request(
            self._url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise ValueError(
                f"{self._url}{path} answers {error.code}: start vllm serve with "
                f"VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls {VllmDeltas.WORKER}"
            ) from error


class VllmDeltas:
    """Deltas of the model that vLLM holds, by name; the face of `DeltaSet`."""

    #: What vLLM is started with as ``worker_extension_cls``.
    WORKER = "gem_ds.serving.vllm_worker.DeltaWorker"

    def __init__(self, engine: Any) -> None:
        """Of a ``vllm.LLM``, or of the address of a server on this machine."""
        self._engine = VllmServer(engine) if isinstance(engine, str) else VllmLlm(engine)

    def add(self, name: str, delta: Delta) -> None:
        """Let every worker take a delta up, without using it.

        Raises:
            ValueError: vLLM holds another base, in another dtype or quantized, or has no place for
                some entries. The model and the other deltas are as they were.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "delta.safetensors")
            delta.save(path)
            self._engine.call("gem_refuse_taken", name)
            try:
                with self._engine.paused():
                    self._engine.call("gem_add_delta", name, str(path), folder)
                path.unlink()
                parts = [part.read_bytes() for part in Path(folder).iterdir()]
                check_parts(delta.mask, parts)
            except Exception:
                self._engine.call("gem_remove_delta", name)  # of workers that have taken it
                raise

    def use(self, name: str | None) -> None:
        """Put a delta into the weights, or the base with None, and drop vLLM's caches.

        Raises:
            ValueError: There is no such delta, or requests are running (with ``vllm.LLM``; a server
                lets them end first).
        """
        with self._engine.paused():
            self._engine.call("gem_use_delta", name)

    def remove(self, name: str) -> None:
        """Forget a delta; if it is in use, the base is from now on."""
        with self._engine.paused():
            self._engine.call("gem_remove_delta", name)


def _check_answers(answers: list[str | None]) -> None:
    if refused := [answer for answer in answers if answer is not None]:
        raise ValueError(refused[0])
