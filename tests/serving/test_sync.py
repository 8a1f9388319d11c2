"""A trainer's values at a receiver, to the bit; messages that are lost, repeated or damaged."""

import ast
import copy
import json
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds import DeltaReceiver, DeltaSender, DeltaSet, DeltaTransfer
from gem_ds.files.mask import MASK_KIND, pack_mask
from gem_ds.files.tensors import save_tensors
from gem_ds.serving import messages
from gem_ds.serving.messages import Kind
from tests.deltas import bits, overwritten
from tests.serving.engine import LLM
from tests.serving.test_delta_set import DTYPES, gpt2, llama, random_delta
from tests.serving.test_vllm_deltas import all_bits, as_if_loaded, checkpoint


class Receiving:
    """A receiver in a thread, which takes messages until the connection ends."""

    def __init__(self, model, address) -> None:
        self.model, self.told = model, []
        self.receiver = DeltaReceiver(DeltaSet(model), socket.create_connection(address))
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while True:
            try:
                self.receiver.receive()
            except ValueError as error:
                self.told.append(str(error))
            except OSError:
                self.receiver.close()
                return


@contextmanager
def connected(mask, *models) -> Iterator[tuple[DeltaSender, list[Receiving]]]:
    sender = DeltaSender(mask, timeout=60)
    receivers = [Receiving(model, sender.address) for model in models]
    try:
        sender.start(len(models))
        yield sender, receivers
    finally:
        sender.close()
        for receiver in receivers:
            receiver.thread.join(60)
            assert not receiver.thread.is_alive()


@settings(deadline=None, max_examples=5)
@given(
    make_model=st.sampled_from([llama, gpt2]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0.01, 0.5, 1.0]),
)
def test_receivers_have_the_trainers_bits_after_every_step(make_model, dtype, seed, share):
    torch.manual_seed(seed)
    base = make_model(dtype)
    before, models = bits(base), [copy.deepcopy(base) for _ in range(2)]
    steps = [random_delta(base, seed, share)]
    for i in range(2):
        mask, all_values = steps[0].mask, random_delta(base, seed + 1 + i, 1.0).values
        values = {name: v[mask.indices[name].long()] for name, v in all_values.items()}
        steps.append(replace(steps[0], values=values))
    with connected(steps[0].mask, *models) as (sender, _):
        for delta in steps:
            sender.send(delta.values)
            expected = overwritten(base, delta)
            assert [bits(model) for model in models] == [expected, expected]
        sent = sum(v.nbytes for delta in steps for v in delta.values.values())
        once = sum(4 * index.numel() for index in mask.indices.values())
        assert once + sent <= sender.num_bytes <= once + sent + 20_000
    assert [bits(model) for model in models] == [before, before]


def lost(sender, values):
    sender._number += 1
    sender.send(values)


def repeated(sender, values):
    sender._number -= 1
    sender.send(values)


def damaged(sender, values):
    """A bit is flipped on the way."""
    honest = messages.header

    def header(kind, number, payload):
        packed = honest(kind, number, payload)
        if kind == Kind.VALUES:
            payload[3] ^= 1
        return packed

    with mock.patch.object(messages, "header", header):
        sender.send(values)


def cut(sender, values):
    sender._exchange(Kind.VALUES, messages.pack_values(sender._mask, values)[2:])


def not_finite(sender, values):
    payload = messages.pack_values(sender._mask, values)
    payload[:4] = b"\xff" * 4
    sender._exchange(Kind.VALUES, payload)


def unknown(sender, values):
    sender._exchange(Kind.DONE, b"")


def cut_mask(sender, values):
    sender._number = 0
    sender._exchange(Kind.MASK, b"no mask")


def changed_mask(sender, change):
    """A mask file whose first indices are other ones, honest but for them."""
    tensors, metadata = pack_mask(sender._mask)
    first = next(iter(tensors))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mask.safetensors")
        save_tensors(path, tensors | {first: change(tensors[first])}, metadata, kind=MASK_KIND)
        sender._number = 0
        sender._exchange(Kind.MASK, path.read_bytes())


def unsorted_mask(sender, values):
    changed_mask(sender, lambda indices: indices.flip(0))


def repeating_mask(sender, values):
    changed_mask(sender, lambda indices: torch.cat([indices[:1], indices]))


def mask_beyond_the_weight(sender, values):
    changed_mask(sender, lambda indices: torch.cat([indices, indices[-1:] + 10_000]))


FAULTS = {
    "message 3 came, and 2 is missing: start the transfer again": lost,
    "message 1 came twice: start the transfer again": repeated,
    "message 2 is damaged, by its checksum": damaged,
    "bytes are not the values of this mask": cut,
    "hold NaN or infinity": not_finite,
    "message 2 is an answer, and no trainer's": unknown,
    "mask.safetensors is not a whole safetensors file": cut_mask,
    "hold duplicates or are not in ascending order; make": unsorted_mask,
    "hold duplicates or are not in ascending order": repeating_mask,
    "is out of range for its shape": mask_beyond_the_weight,
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_message_that_does_not_fit_is_told_in_a_sentence_and_changes_nothing(message):
    model = llama(torch.bfloat16)
    delta = random_delta(model, 0)
    others = {name: values + 1 for name, values in delta.values.items()}
    with connected(delta.mask, model) as (sender, (receiving,)):
        sender.send(delta.values)
        after = bits(model)
        with pytest.raises(ValueError, match=r"^1 of 1 receivers refused the weights: ") as caught:
            FAULTS[message](sender, others)
        assert message in str(caught.value)
        (told,) = receiving.told
        assert message in told
        assert bits(model) == after
        sender.start()  # which puts everything right
        sender.send(others)
        assert bits(model) == overwritten(model, replace(delta, values=others))


def test_values_that_do_not_fit_are_refused_before_anything_is_sent():
    model = llama()
    delta = random_delta(model, 0)
    name = next(iter(delta.values))
    with connected(delta.mask, model) as (sender, (receiving,)):
        before, sent = bits(model), sender.num_bytes
        for wrong in (delta.values[name] * torch.nan, delta.values[name].half(), torch.ones(1)):
            with pytest.raises(ValueError, match=f"the values of '{name}'"):
                sender.send({**delta.values, name: wrong})
        assert (receiving.told, sender.num_bytes, bits(model)) == ([], sent, before)


def test_another_base_is_refused_at_the_start_and_so_is_a_stranger():
    model = llama()
    delta = random_delta(llama(), 0)
    before = bits(model)
    refused = "receivers refused the weights: this delta was made for"
    with pytest.raises(ValueError, match=refused), connected(delta.mask, model):
        pass
    assert bits(model) == before
    here, there = socket.socketpair()
    receiver = DeltaReceiver(DeltaSet(model), here)
    there.sendall(b"GET / HTTP/1.1" + bytes(80))
    with pytest.raises(ConnectionError, match="no message of gem_ds: check host and port"):
        receiver.receive()
    there.close()


class Server(ThreadingHTTPServer):
    """The routes of vLLM's server that a transfer calls, over the stand-in's workers."""

    def __init__(self, llm) -> None:
        self.llm, self.calls = llm, []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM's routers do."""

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        assert self.path == "/get_world_size"
        self._answer({"world_size": len(self.server.llm.workers)})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/collective_rpc":
            self.server.calls.append(self.path)
            self._answer({"status": "done"})
        elif not hasattr(self.server.llm.workers[0], body["method"]):
            self.send_error(500)
        else:
            self._answer({"results": self._everywhere(body["method"], body.get("args", []))})

    def _everywhere(self, method, args):
        """In all workers at once, as they are processes."""
        found = {}

        def call(worker) -> None:
            found[worker.rank] = getattr(worker, method)(*args)

        threads = [threading.Thread(target=call, args=(w,)) for w in self.server.llm.workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[worker.rank] for worker in self.server.llm.workers]

    def _answer(self, content) -> None:
        payload = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


@pytest.fixture
def serving():
    servers = []

    def serve(llm) -> Server:
        server = Server(llm)
        threading.Thread(target=server.serve_forever).start()
        servers.append(server)
        return server

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def weights_of(base, delta):
    """What TRL's trainer yields: every weight, whole."""
    trained = copy.deepcopy(base)
    for name, values in delta.values.items() if delta is not None else ():
        trained.get_parameter(name).data.view(-1)[delta.mask.indices[name].long()] = values
    return iter(trained.state_dict().items())


def trl_protocol() -> dict[str, list[str]]:
    """Methods and arguments of TRL's protocol, from its source: to import it takes its server."""
    folder = Path(find_spec("trl").origin).parent / "experimental" / "async_grpo"
    tree = ast.parse((folder / "async_grpo_trainer.py").read_text(encoding="utf-8"))
    (found,) = (
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "WeightTransferProtocol"
    )
    methods = [node for node in found.body if isinstance(node, ast.FunctionDef)]
    return {method.name: [arg.arg for arg in method.args.args] for method in methods}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_transfer_has_the_face_that_trl_calls_and_reaches_every_worker(serving, world_size):
    base = checkpoint()
    server = serving(LLM(base, world_size))
    before = all_bits(server.llm)
    delta = random_delta(base, 0)
    transfer = DeltaTransfer(delta.mask, server.url, timeout=60)
    face = {name: signature(getattr(DeltaTransfer, name)) for name in trl_protocol()}
    assert {name: list(found.parameters) for name, found in face.items()} == trl_protocol()
    transfer.init_weight_transfer()
    once = transfer.num_bytes
    for step in range(3):
        values = {name: v + step for name, v in delta.values.items()}
        transfer.pause()
        transfer.send_weights(weights_of(base, replace(delta, values=values)))
        transfer.resume()
        expected = as_if_loaded(base, world_size, replace(delta, values=values))
        assert all_bits(server.llm) == expected
    assert transfer.num_bytes == once + 3 * 2 * delta.mask.num_selected
    assert server.calls == ["/pause?mode=keep", "/resume"] * 3
    transfer.destroy()
    transfer.destroy()
    assert all_bits(server.llm) == before


def test_a_transfer_refuses_what_does_not_fit(serving):
    base = checkpoint()
    server = serving(LLM(base, 2))
    before = all_bits(server.llm)
    other = random_delta(checkpoint(), 1)
    transfer = DeltaTransfer(other.mask, server.url, timeout=60)
    with pytest.raises(ValueError, match="this delta was made for other base weights"):
        transfer.init_weight_transfer()
    assert all_bits(server.llm) == before
    with pytest.raises(ValueError, match="call init_weight_transfer first"):
        transfer.send_weights(iter(()))
    transfer = DeltaTransfer(random_delta(base, 0).mask, server.url, timeout=60)
    transfer.init_weight_transfer()
    with pytest.raises(ValueError, match="the trainer sends no weight"):
        transfer.send_weights(iter(()))
    broken = copy.deepcopy(base)
    broken.model.embed_tokens.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        transfer.send_weights(iter(broken.state_dict().items()))
    assert all_bits(server.llm) == before
    transfer.destroy()
    plain = serving(SimpleNamespace(workers=[object()]))
    with pytest.raises(ValueError, match="start vllm serve with VLLM_SERVER_DEV_MODE=1"):
        DeltaTransfer(other.mask, plain.url, timeout=60).init_weight_transfer()
