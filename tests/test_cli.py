"""The programs' common end: an error is a sentence and a status, whatever the program."""

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from gem_ds import cli
from gem_ds.errors import Interrupted, PeerError
from gem_ds.files.mask import Mask
from gem_ds.flags import name_of

OLD_MASK = Path(__file__).parent / "files_0_1/llama/mask.safetensors"


def end(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> int:
    """The status of a program whose main returns or raises ``outcome``."""

    def main(argv: object) -> Any:
        assert argv == ["--seed", "1"]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=main))
    return cli.main(["eval", "score", "--seed", "1"])


@pytest.mark.parametrize(
    ("outcome", "status", "told"),
    [
        (None, 0, ""),
        ({"a": 1}, 0, ""),
        (1, 1, ""),
        (ValueError("So."), 1, "Error: So.\n"),
        (FileNotFoundError("There is no file f."), 1, "Error: There is no file f.\n"),
        (OSError(errno.ENOSPC, "f cannot be written."), 1, "Error: f cannot be written.\n"),
        (SafetensorError("torn"), 1, "Error: torn\n"),
        (PeerError("Elsewhere."), 1, ""),
        (Interrupted(), 130, "Stopped; the same command goes on from here.\n"),
    ],
)
def test_every_ending_has_its_status_and_its_sentence(monkeypatch, capsys, outcome, status, told):
    monkeypatch.delenv("RANK", raising=False)
    assert end(monkeypatch, outcome) == status
    assert capsys.readouterr().err == told


def test_a_rank_names_itself_and_a_fault_of_the_program_is_raised(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "2")
    assert end(monkeypatch, ValueError("So.")) == 1
    assert capsys.readouterr().err == "Error: On rank 2: So.\n"
    with pytest.raises(KeyError):
        end(monkeypatch, KeyError("bug"))


def _exhausted(take: Callable[[], object]) -> Exception:
    """What a library raises where something is to be had no more."""
    try:
        take()
    except Exception as error:
        return error
    raise AssertionError("there was enough")


def _without_files(read: Callable[[], object]) -> Callable[[], object]:
    """The same, in a process that may open no more files."""

    def take() -> None:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(free := os.open(os.devnull, os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            read()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    return take


def _fill_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nGPU 0 has a total capacity of 80 GiB")


LIMITS = {
    "of Python's memory": (lambda: bytes(2**62), "free memory"),
    "of torch's memory": (lambda: torch.empty(2**50), "free memory"),
    "of a GPU's": (_fill_gpu, "batch size"),
    "of open files": (_without_files(Path(__file__).read_text), "ulimit -n"),
    "of a tensor file's": (_without_files(lambda: Mask.load(OLD_MASK)), "ulimit -n"),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_of_the_machine_is_a_sentence(monkeypatch, capsys, limit):
    take, remedy = LIMITS[limit]
    assert end(monkeypatch, _exhausted(take)) == 1
    told = capsys.readouterr().err
    assert re.fullmatch(
        rf"Error: A limit of this machine is reached \(.+\): .*{remedy}.*\.\n", told
    )


def test_every_program_is_there_and_unknown_ones_are_told_which(capsys):
    for module, _ in cli.PROGRAMS.values():
        assert callable(import_module(module).main)
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"gem-ds {name}" in shown for name in cli.PROGRAMS)
    for words in ([], ["eval"], ["eval", "gsm9k"], ["--densty"]):
        assert cli.main(words) == 2
        assert capsys.readouterr().err == shown


@pytest.mark.parametrize(
    ("module", "script", "typed"),
    [
        (None, "/usr/bin/gem-ds", "gem-ds eval gsm8k"),
        (None, "launch/train.py", "launch/train.py"),
        ("eval.gsm8k", "/here/eval/gsm8k.py", "python -m eval.gsm8k"),
        ("gem_ds.train.__main__", "/here/gem_ds/train/__main__.py", "python -m gem_ds.train"),
        ("gem_ds.cli", "/here/gem_ds/cli.py", "python -m gem_ds.cli eval gsm8k"),
    ],
)
def test_a_program_is_called_what_the_user_typed(monkeypatch, module, script, typed):
    spec = None if module is None else SimpleNamespace(name=module)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", [script])
    assert name_of("eval gsm8k") == typed


@pytest.mark.parametrize("program", cli.PROGRAMS)
def test_every_help_calls_its_program_by_its_name(monkeypatch, capsys, program):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["gem-ds"])
    with pytest.raises(SystemExit):
        cli.main([*program.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()  # the first of all may be DeepSpeed's
    assert any(line.startswith(f"usage: gem-ds {program} [") for line in lines)


def test_help_and_usage_import_nothing_heavy():
    """A shell waits for `gem-ds --help`; torch takes seconds."""
    program = "import sys; from gem_ds import cli; cli.main([]); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["--help", "delta info --help", f"delta info {OLD_MASK}"])
def test_a_program_whose_output_nobody_reads_on_says_nothing(words, unbuffered):
    """As behind `| head`: no traceback, and none from Python at its end."""
    command = [sys.executable, "-m", "gem_ds.cli", *words.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, env=environment, **pipes) as program:
        assert program.stdout is not None
        program.stdout.close()
        assert program.stderr is not None
        assert program.stderr.read() == b""
    assert program.returncode in (0, 1)


def test_a_program_without_an_output_ends_well():
    command = f"{sys.executable} -m gem_ds.cli delta info {OLD_MASK} >&-"
    found = subprocess.run(command, shell=True, stderr=subprocess.PIPE)
    assert (found.returncode, found.stderr) == (0, b"")


def test_a_pipe_of_its_own_that_breaks_is_told(monkeypatch, capsys):
    assert end(monkeypatch, BrokenPipeError(errno.EPIPE, "The sandbox is gone.")) == 1
    assert capsys.readouterr().err == "Error: The sandbox is gone.\n"
