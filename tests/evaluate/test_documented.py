"""Every command of the pages on evaluation is one that the programs and their launchers take."""

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from deepspeed.launcher.runner import parse_args as parse_deepspeed  # noqa: TID251
from torch.distributed.run import get_args_parser  # noqa: TID251

from gem_ds import cli, flags
from gem_ds.evaluate import evaluator, score

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(name for name in cli.PROGRAMS if name.startswith("eval "))
#: What the words of a command stand for.
MEANING = {"...": ["--model_name_or_path", "M", "--output_dir", "O"], "N": ["9"]}


def documented() -> list[str]:
    """The commands in the shell blocks of the pages, and in the programs' own docstrings."""
    texts = []
    for page in ("README.md", "docs/evaluation.md"):
        texts += re.findall(r"```shell\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    for path in sorted((ROOT / "gem_ds" / "evaluate").glob("*.py")):
        texts += re.findall(r"\n    (python -m eval.*?)\n\n", path.read_text("utf-8"), re.DOTALL)
    joined = (re.sub(r"\\\n|\n {20,}|\n {8}(?=\[)", " ", text) for text in texts)
    lines = [line.strip() for text in joined for line in text.splitlines()]
    return [line for line in lines if "eval." in line]


def words_of(command: str) -> list[str]:
    """A command's words, with all that it offers in brackets, and the first of alternatives."""
    words = shlex.split(command.replace("[", " ").replace("]", " "), comments=True)
    return [part.split("|")[0] for word in words for part in MEANING.get(word, [word])]


def as_started(words: list[str]) -> tuple[str, list[str]]:
    """The program that a launcher starts, and the flags that it hands on."""
    launcher, *rest = words
    if launcher == "python":
        assert rest[0] == "-m"
        return rest[1], rest[2:]
    if launcher == "torchrun":
        started = get_args_parser().parse_args(rest)
        program, arguments = started.training_script, started.training_script_args
    else:
        started = parse_deepspeed(rest)
        program, arguments = started.user_script, started.user_args
    assert started.module
    return program, arguments


class ParsedError(Exception):
    """The flags were taken, and the program would begin."""


@pytest.fixture
def parsing_only(monkeypatch):
    def begin(*arguments: object, **options: object) -> None:
        raise ParsedError

    monkeypatch.setattr(evaluator, "check_arguments", begin)
    monkeypatch.setattr(score.gsm8k, "load", begin)
    monkeypatch.setattr(score.passk, "load", begin)


def test_there_are_commands_of_every_program_and_launcher():
    commands = documented()
    assert len(commands) > 12
    for words in (*(f"-m {name.replace(' ', '.')}" for name in PROGRAMS), "torchrun", "deepspeed"):
        assert any(words in command for command in commands), words


@pytest.mark.parametrize("command", documented())
def test_a_documented_command_is_taken(parsing_only, command):
    name, arguments = as_started(words_of(command))
    with pytest.raises(ParsedError):
        import_module(name.replace("eval.", "gem_ds.evaluate.")).main(arguments)


@pytest.mark.parametrize("program", PROGRAMS)
def test_launchers_hand_every_flag_on(monkeypatch, program):
    """They take `--n` for the beginning of some flag of their own."""
    parsers: list[argparse.ArgumentParser] = []

    def keep(*arguments: object) -> None:
        parsers.append(flags.parser_of(*arguments))
        raise ParsedError

    module = import_module(cli.PROGRAMS[program][0])
    for place in (evaluator, score):
        monkeypatch.setattr(place, "parser_of", keep)
    with pytest.raises(ParsedError):
        module.main([])
    for action in parsers[0]._actions:
        if flag := next(iter(action.option_strings), None):
            name = program.replace(" ", ".")
            for launcher in (["torchrun", "-m"], ["deepspeed", "--module"]):
                assert as_started([*launcher, name, flag, "1"]) == (name, [flag, "1"])
