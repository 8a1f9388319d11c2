"""Deltas on the Hub: a server of files of our own, and the library's answers replaced."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from torch import nn

from gem_ds.files import hub
from gem_ds.files.delta import Delta, card_of
from gem_ds.files.mask import Mask
from tests.deltas import bytes_of, make_delta


def a_delta(base_model: str) -> Delta:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(torch.bfloat16)
    return make_delta(model, {"0.weight": [1, 7, 29], "1.weight": [0]}, base_model)


class Hub(ThreadingHTTPServer):
    """Repositories as {(name, revision): {path: bytes}}, with the few routes that are asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.tokens: set[str | None] = set()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    """`resolve` of files; `create`, `preupload` and `commit` of the API."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        content = self.server.repositories.get((name, revision), {}).get(file)
        if content is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        digest = hashlib.sha1(content).hexdigest()
        commit = hashlib.sha1(f"{name} {revision}".encode()).hexdigest()
        self.answer(200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": commit})

    def do_POST(self) -> None:
        self.server.tokens.add(self.headers["Authorization"])
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found: dict[str, Any] = {"errors": [], "warnings": []}  # of validate-yaml
        if self.path.endswith("repos/create"):
            wanted = json.loads(body)
            full = f"{wanted['organization']}/{wanted['name']}"
            self.server.repositories.setdefault((full, "main"), {})
            found = {"url": f"{self.server.address}/{full}", "name": full}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            found = {"files": [{"path": file["path"], **plain} for file in files]}
        elif "/commit/" in self.path:
            name, _, revision = self.path.removeprefix("/api/models/").partition("/commit/")
            repository = self.server.repositories.setdefault((name, revision), {})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    repository[value["path"]] = base64.b64decode(value["content"])
            found = {"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "a" * 40}
        self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


CLIENT = """
import sys
from pathlib import Path
from gem_ds import Delta, Mask

delta = Delta.load(sys.argv[1])
print(delta.push_to_hub("me/mine", scores={"accuracy": 0.75}, token="hf_mine"))
print(delta.push_to_hub("me/mine", scores={"accuracy": 0.25}, token="hf_mine"))
for name, revision in (("me/mine", None), ("me/mine", "v1")):
    Delta.from_pretrained(name, revision=revision).save(f"{sys.argv[2]}/{revision}.safetensors")
for read, name, revision in (
    (Delta.from_pretrained, "me/mine", "v2"),
    (Delta.from_pretrained, "me/none", None),
    (Mask.from_pretrained, "me/mine", None),
):
    try:
        read(name, revision=revision)
    except ValueError as error:
        print(error)
"""


def test_a_delta_goes_to_the_hub_and_comes_back(server, tmp_path):
    """In a process of its own, as the Hub's address is read when the library is imported."""
    delta = a_delta("them/base")
    card = ModelCard("---\nlicense: apache-2.0\n---\n# Base")
    server.repositories["them/base", "main"] = {"README.md": str(card).encode()}
    delta.save(tmp_path / "delta.safetensors")
    other = a_delta("them/base")
    other.values["1.weight"] += 1
    other.save(tmp_path / "other.safetensors")
    old = (tmp_path / "other.safetensors").read_bytes()
    server.repositories["me/mine", "v1"] = {"delta.safetensors": old}
    settings = {
        "HF_ENDPOINT": server.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-c", CLIENT, str(tmp_path / "delta.safetensors"), str(tmp_path)]
    ended = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    *pushed, no_revision, no_repository, no_mask = ended.stdout.splitlines()
    assert pushed == [f"{server.address}/me/mine/commit/1"] * 2
    assert "delta.safetensors of that repository of the Hub cannot be fetched" in no_revision
    assert no_repository.startswith("me/none is no file or folder here")
    assert "mask.safetensors of that repository" in no_mask
    assert server.tokens == {"Bearer hf_mine"}
    for revision, expected in ((None, delta), ("v1", other)):
        found = Delta.load(tmp_path / f"{revision}.safetensors")
        assert found.mask.weights == expected.mask.weights
        for name, values in expected.values.items():
            assert bytes_of(found.values[name]) == bytes_of(values)
    text = server.repositories["me/mine", "main"]["README.md"].decode()
    data = ModelCard(text).data
    assert (data.license, data.base_model) == ("apache-2.0", "them/base")
    assert data.eval_results[0].metric_value == 0.75, "a card that is there stays"
    assert "at 4 of its 59 parameters (6.7797%)" in text
    assert "| density | 0.1 |" in text
    assert "metrics.jsonl" not in text


def test_a_folder_or_a_file_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "hf_hub_download", pytest.fail)
    delta = a_delta("base")
    delta.save(tmp_path / "delta.safetensors")
    delta.mask.save(tmp_path / "mask.safetensors")
    for name in (tmp_path, str(tmp_path), tmp_path / "delta.safetensors"):
        assert bytes_of(Delta.from_pretrained(name).values["0.weight"]) == bytes_of(
            delta.values["0.weight"]
        )
    assert Mask.from_pretrained(tmp_path).num_selected == 4


def test_what_the_hub_refuses_is_told(monkeypatch):
    """With its API replaced; nothing is asked before the repository is there."""

    def refuse(self: HfApi, *_: Any, **options: Any) -> None:
        assert options == {"private": True, "exist_ok": True}
        raise OSError("401 Client Error\n\nInvalid username or password.")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    monkeypatch.setattr(HfApi, "upload_folder", pytest.fail)
    with pytest.raises(ValueError, match="cannot be pushed to me/mine: 401 Client Error"):
        a_delta("base").push_to_hub("me/mine", private=True)


def test_the_licence_is_that_of_the_base(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.license_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Base")
    assert hub.license_of(str(tmp_path)) == "mit"
    card = card_of(a_delta(str(tmp_path)), "me/mine", {}, "mit").text()
    assert ModelCard(card).data.license == "mit"
    assert "Delta.from_pretrained('me/mine')" in card
