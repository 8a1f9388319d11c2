"""The suite of honest, hostile and awkward programs: right verdicts, and nothing got out or stayed.

The programs lie in sandbox_programs, a file for each family, and all run at every level and in
every way that this machine has. Each has the statuses that are right for it, its family's if it
names none. A program that tries to escape says what came of it, so that its tests pass where it was
held. A name between two @ signs is replaced:

    @code@       the folder that the package is imported from
    @canary@     a file outside, which must stay as it is
    @listener@   the port of a socket that the parent listens on
    @parent@     the parent's process id
    @marker@     a name that nothing else on this machine has
    @attempt@    a function that says 'held' if each of some calls is refused
    @equal@      a class whose objects equal everything
"""

import os
import secrets
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gem_ds.evaluate.sandbox import Program, Sandbox, Verdict
from gem_ds.evaluate.sandbox.pool import LEVELS, WEAK_LEVELS, problem_of
from gem_ds.evaluate.sandbox.room import code_folder

pytestmark = pytest.mark.slow  # starts engines or programs

FOLDER = Path(__file__).with_name("sandbox_programs")
#: a level, and whether each program gets a fresh interpreter
WAYS = [("bubblewrap", True), ("namespaces", False), ("namespaces", True), ("landlock", False)]
EXPECTED = {
    "honest": ["passed"],
    "forged": ["failed"],
    "escape": ["passed"],
    "time": ["timeout"],
    "awkward": ["failed"],
}
TIMEOUT = {"time": 0.4}  # all others must have time on a loaded machine too
STAND_INS = tomllib.loads(Path(__file__).with_name("stand_ins.toml").read_text())


class World:
    """What lies around the sandbox and must not be reached from within."""

    def __init__(self, folder: Path) -> None:
        self.marker = f"marker{secrets.token_hex(8)}"
        self.folder = folder
        self.canary = folder / "canary"
        self.canary.write_text(self.marker)
        self.listeners = [socket.create_server(("127.0.0.1", 0))]
        for name in (f"\0{self.marker}", f"{self.canary}.socket"):
            self.listeners.append(socket.socket(socket.AF_UNIX))
            self.listeners[-1].bind(name)
            self.listeners[-1].listen()
        self.datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.datagrams.bind(f"{self.canary}.datagrams")
        self.tensor = torch.ones(1000)  # the parent has torch loaded, and holds something in it

    def close(self) -> None:
        for listener in (*self.listeners, self.datagrams):
            listener.close()

    def prepare(self, text: str) -> str:
        values = {
            "code": code_folder(),
            "canary": str(self.canary),
            "listener": str(self.listeners[0].getsockname()[1]),
            "parent": str(os.getpid()),
            "marker": self.marker,
            "surrogate": "\ud800",
            "nested": "(" * 500 + "1" + ")" * 500,
        } | STAND_INS
        for name, value in values.items():
            text = text.replace(f"@{name}@", value)
        return text

    def programs(self) -> Iterator[tuple[dict[str, Any], Program]]:
        """All programs of the suite, and what is known of each."""
        for family, expected in EXPECTED.items():
            for name, known in tomllib.loads((FOLDER / f"{family}.toml").read_text()).items():
                program = Program(
                    self.prepare(known["program"]),
                    tuple(map(self.prepare, known["tests"])),
                    setup=known.get("setup", ""),
                    timeout=known.get("timeout", TIMEOUT.get(family, 20.0)),
                    memory_mb=512,
                )
                yield {"name": name, "family": family, "expected": expected} | known, program


class Run:
    """The suite's verdicts in one way of running it, and what was seen from outside."""

    def __init__(self, world: World, level: str, fresh: bool) -> None:
        self.level, self.world = level, world
        cases, programs = zip(*world.programs(), strict=True)
        other = Program("def f(): return 'other_solution'", ("assert f() == 'other_solution'",))
        os.environ["A_SECRET"] = "SECRET"
        before = _surroundings(world.marker)
        with Sandbox(2, level, allow_weak=True, fresh=fresh) as sandbox:
            assert all(v.status == "passed" for v in sandbox.check_all([other] * 6))
            servers, first = _descendants(), sandbox.processes()
            verdicts = sandbox.check_all(programs)
            self.verdicts: list[tuple[dict[str, Any], Verdict]] = list(
                zip(cases, verdicts, strict=True)
            )
            self.survivors = _descendants() - servers
            self.num_replaced = sum(a != b for a, b in zip(first, sandbox.processes(), strict=True))
        del os.environ["A_SECRET"]
        after = _surroundings(world.marker)
        self.changes = {k: (before[k], after[k]) for k in before if before[k] != after[k]}


def _surroundings(marker: str) -> dict[str, object]:
    """What a program could leave behind on this machine."""
    return {
        "processes": _descendants(),
        "mounts": Path("/proc/self/mounts").read_text(),
        "marked files": [
            n for d in ("/dev/shm", "/tmp", "/") for n in os.listdir(d) if marker in n
        ],
        "queues": [Path(f"/proc/sysvipc/{kind}").read_text() for kind in ("shm", "msg", "sem")],
        "descriptors": sorted(os.listdir("/proc/self/fd")),
        "limits": Path("/proc/self/limits").read_text(),
        "tracer": [s for s in Path("/proc/self/status").read_text().splitlines() if "Tracer" in s],
    }


def _descendants() -> set[int]:
    """The processes that this one has started, and those that they have."""
    found: set[int] = set()
    pids = [os.getpid()]
    while pids:
        for children in Path(f"/proc/{pids.pop()}/task").glob("*/children"):
            pids += map(int, children.read_text().split())
        found.update(pids)
    return found


@pytest.fixture(
    scope="module", params=WAYS, ids=lambda way: f"{way[0]}-{'fresh' if way[1] else 'forked'}"
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The whole suite at one level, or a skip that names the level and says why."""
    level, fresh = request.param
    if problem := problem_of(level, fresh):
        pytest.skip(f"{level}: {problem}")
    world = World(tmp_path_factory.mktemp("world"))
    yield Run(world, level, fresh)
    world.close()


def test_every_verdict_is_right(run):
    for case, verdict in run.verdicts:
        if run.level not in case.get("not_at", []):  # levels that do not promise it
            assert verdict.status in case["expected"], (case["name"], verdict)
        assert (case["family"], verdict.status) != ("forged", "passed")
        assert verdict.isolation == run.level
        assert verdict.detail.isprintable()
        assert len(verdict.detail) < 400


def test_nothing_outside_was_changed_reached_or_left_behind(run):
    world = run.world
    assert world.canary.read_text() == world.marker
    files = sorted(path.name for path in world.folder.iterdir())
    assert files == ["canary", "canary.datagrams", "canary.socket"]
    assert world.tensor.sum() == 1000
    for listener in world.listeners:
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    world.datagrams.setblocking(False)
    with pytest.raises(BlockingIOError):
        world.datagrams.recv(1)
    assert not run.survivors
    names = {path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm")}
    assert world.marker[:15] not in names
    assert not run.changes
    assert run.num_replaced == 0, "a server died, and a job was tried again: no verdict would tell"


def test_all_families_run_at_all_levels_and_one_with_namespaces_is_here():
    """Otherwise the above would be skipped, and nobody would see it."""
    assert {path.stem for path in FOLDER.iterdir()} == set(EXPECTED)
    assert {level for level, _ in WAYS} == set(LEVELS)
    assert any(problem_of(level) is None for level in LEVELS if level not in WEAK_LEVELS)
