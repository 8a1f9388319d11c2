r"""HumanEval: functions to be completed behind header and docstring (arXiv 2107.03374).

    prompt      the problem's own, as it stands: imports, helpers, `def name(...):`, a docstring
    stops       `\nclass`, `\ndef`, `\n#`, `\nif`, `\nprint`
    program     prompt + completion
    tests       the problem's function `check`, called with the program's

All of this is the paper's and its code's (openai/human-eval). Beyond it, an answer that does not
continue the function but writes it anew, alone or in words and fences, is the program, behind the
imports and helpers of the prompt. These are set up for the tests too, which use some.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gem_ds.data.tasks import Prompt
from gem_ds.data.tasks.lines import Line, parse_jsonl
from gem_ds.data.tasks.published import read_hub
from gem_ds.evaluate.extraction import find_program
from gem_ds.evaluate.prompt_form import DEFAULT_FORM, PromptForm
from gem_ds.evaluate.sandbox import Program

HUB_DATASET = "openai/openai_humaneval"
FILES = ("HumanEval.jsonl", "HumanEval.jsonl.gz")
STOP_STRINGS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem."""

    prompt: str  # what is to be continued
    before: str  # the part of the prompt before the function
    entry_point: str  # the function's name
    test: str  # defines `check(candidate)`


@dataclass(frozen=True, kw_only=True)
class HumanEval:
    """The benchmark (`gem_ds.evaluate.passk.Benchmark`)."""

    problems: dict[str, Problem]  # those that are asked, by task id
    data_sha256: dict[str, str]  # what tells the data from others, by file or by name

    def stop_strings(self, form: PromptForm = DEFAULT_FORM) -> tuple[str, ...]:
        """What leaves the function; the message of a chat ends by itself."""
        return () if form.apply_chat_template else STOP_STRINGS

    def num_fewshot(self, wanted: int | None) -> int:
        """How many worked problems a prompt shows, None for the default; refuses what cannot be."""
        if wanted:
            raise ValueError(f"--num_fewshot must be 0 for --task humaneval, not {wanted}.")
        return 0

    def num_shown(self, prompt: str) -> int:
        """How many worked problems a prompt seems to show."""
        return 0

    def prompts(self, num_fewshot: int, form: PromptForm = DEFAULT_FORM) -> dict[str, Prompt]:
        """By task id; ValueError where the data cannot give them."""
        return {name: form.prompt(problem.prompt, []) for name, problem in self.problems.items()}

    def program(self, task_id: str, completion: str) -> Program:
        """What is run for a completion, with the problem's tests; no completion fails."""
        problem = self.problems[task_id]
        source = problem.prompt + completion
        if re.match(r"\s*\S", completion) and not re.match(r"(?:[ \t]*\r?\n)*[ \t]", completion):
            anew = find_program(completion, problem.entry_point)
            source = source if anew is None else problem.before + anew
        test = f"{problem.test}\ncheck({problem.entry_point})"
        return Program(source, (test,), setup=problem.before, entry_point=problem.entry_point)

    def protocol(self, num_fewshot: int) -> dict[str, Any]:
        """How it is asked, for results.json."""
        return {"split": "test", "num_fewshot": num_fewshot}


def load(data_dir: str | None, limit: int | None = None) -> HumanEval:
    """The first `limit` problems, of one of `FILES` as the benchmark ships it or from the Hub."""
    if data_dir is None:
        source, rows = HUB_DATASET, read_hub((HUB_DATASET,), "test")
        content = "".join(json.dumps(row.fields, sort_keys=True) + "\n" for row in rows).encode()
    else:
        paths = [Path(data_dir, name) for name in FILES if Path(data_dir, name).is_file()]
        if not paths:
            raise ValueError(f"There is no file {FILES[0]} or {FILES[1]} in {data_dir}: check it.")
        path, source, content = paths[0], paths[0].name, paths[0].read_bytes()
        try:
            lines = gzip.decompress(content) if path.suffix == ".gz" else content
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{path} cannot be unpacked ({error}): download it again.") from error
        rows = parse_jsonl(path, lines)
    problems: dict[str, Problem] = {}
    for row in rows:
        if (task_id := row.text("task_id")) in problems:
            raise row.error(f"there is another problem {task_id!r}: remove one of them.")
        problems[task_id] = _problem(row)
    if not problems:
        raise ValueError(f"{source} holds no problem: download it again.")
    sha256 = hashlib.sha256(content).hexdigest()
    return HumanEval(problems=dict(list(problems.items())[:limit]), data_sha256={source: sha256})


def _problem(row: Line) -> Problem:
    prompt, name = row.text("prompt"), row.text("entry_point")
    headers = [*re.finditer(rf"^def {re.escape(name)}\b", prompt, re.MULTILINE)]
    if not headers:
        raise row.error(f"the prompt has no function {name!r}, which is its entry_point.")
    before = prompt[: headers[-1].start()]
    return Problem(prompt=prompt, before=before, entry_point=name, test=row.text("test"))
