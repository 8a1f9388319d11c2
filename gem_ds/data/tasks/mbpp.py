r"""MBPP: short Python problems with solutions and tests (Austin et al., arXiv 2108.07732).

    prompt = "You are an expert Python programmer, and here is your task: {text} Your code should
              pass these tests:\n\n{tests}\n[BEGIN]\n"            target = "{code}\n[DONE]"

The form is that of the dataset's own README, tests one to a line; evaluation asks with the same
functions. The full set has 974 problems, whose ids say what they are for (`SPLITS`). The sanitized
set has 427 of them, checked by hand and partly rewritten; it names two fields differently:

    mbpp.jsonl              text     test_setup_code (text)
    sanitized-mbpp.json     prompt   test_imports (list of lines)

The full set's `challenge_test_list` is not read: no published protocol runs it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gem_ds.data.tasks import Example, Source, TaskData
from gem_ds.data.tasks.lines import Line, numbered, read_jsonl
from gem_ds.data.tasks.published import read_json

HUB_DATASET = "google-research-datasets/mbpp"

#: The ids of each split, the same in both sets.
SPLITS: Mapping[str, range] = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem; its id also says its split."""

    task_id: int
    text: str
    code: str  # the reference solution, as the dataset has it (many with `\r\n` line ends)
    tests: tuple[str, ...]  # assert statements
    setup: str  # code that the tests need, often none; it may use what the solution defines


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The problems by id, in the order of their source, and what tells this source from another."""

    problems: dict[int, Problem]
    source: str  # the file's name, or the Hub's name and configuration
    sha256: str  # of the file's bytes; from the Hub, of its rows as sorted JSON, one to a line

    def split(self, name: str) -> list[Problem]:
        """The problems of a split of `SPLITS`, by id; ValueError if there are none."""
        ids = SPLITS[name]
        if not (found := sorted(self.problems.keys() & set(ids))):
            raise ValueError(
                f"{self.source} has no problem of the {name} split (ids {ids.start} to "
                f"{ids.stop - 1}): check that the file is whole."
            )
        return [self.problems[task_id] for task_id in found]


def prompt_of(text: str, tests: Iterable[str]) -> str:
    """The prompt for one problem, without any worked example before it."""
    listed = "\n".join(tests)
    return (
        f"You are an expert Python programmer, and here is your task: {text} "
        f"Your code should pass these tests:\n\n{listed}\n[BEGIN]\n"
    )


def target_of(code: str) -> str:
    """What the model should write after the prompt."""
    return f"{code}\n[DONE]"


def load(source: Source) -> TaskData:
    r"""Load the full set for training: the train split (374), and validation (90) as held-out.

    The test split stays unseen, for `eval.passk`. Line ends of the solutions are made `\n`: a
    carriage return is an accident of the file and not worth a token to learn.
    """
    dataset = load_problems(source.data_dir)
    train, test = (map(_example, dataset.split(name)) for name in ("train", "validation"))
    return TaskData(train=[*train], test=[*test])


def load_problems(data_dir: str | Path | None, *, sanitized: bool = False) -> Dataset:
    """Load all problems of the full or the sanitized set, from the Hub if there is no folder.

    Raises:
        ValueError: The file is missing or malformed, a problem lacks a field or has no tests, or an
            id occurs twice or belongs to no split; the sentence names the place.
    """
    if data_dir is None:
        from datasets import load_dataset

        name = "sanitized" if sanitized else "full"
        source = f"{HUB_DATASET} ({name})"
        fields = [dict(row) for split in load_dataset(HUB_DATASET, name).values() for row in split]
        rows = numbered(Path(HUB_DATASET), fields, "row")
        content = "".join(json.dumps(row, sort_keys=True) + "\n" for row in fields).encode()
    else:
        path = Path(data_dir, "sanitized-mbpp.json" if sanitized else "mbpp.jsonl")
        source, rows = path.name, _read_list(path) if sanitized else read_jsonl(path)
        content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    return Dataset(problems=_problems(rows, sanitized), source=source, sha256=sha256)


def _read_list(path: Path) -> list[Line]:
    """The objects of a file that is one JSON list."""
    values = read_json(path)
    if not (isinstance(values, list) and all(isinstance(value, dict) for value in values)):
        raise ValueError(f"{path} must be one JSON list of objects: download it again.")
    return numbered(path, values, "entry")


def _problems(rows: list[Line], sanitized: bool) -> dict[int, Problem]:
    problems: dict[int, Problem] = {}
    text, setup = ("prompt", "test_imports") if sanitized else ("text", "test_setup_code")
    for row in rows:
        task_id = row.fields.get("task_id")
        if type(task_id) is not int or not 1 <= task_id <= 974:
            raise row.error(
                f"the field 'task_id' must be a whole number from 1 to 974, not {task_id!r}."
            )
        if task_id in problems:
            raise row.error(f"there is another problem with task_id {task_id}: remove one of them.")
        problems[task_id] = Problem(
            task_id=task_id,
            text=row.text(text),
            code=row.text("code"),
            tests=row.texts("test_list"),
            setup="\n".join(row.texts(setup)) if sanitized else row.text(setup),
        )
        if not problems[task_id].tests:
            raise row.error(f"problem {task_id} has no tests, so that any program would pass.")
    return problems


def _example(problem: Problem) -> Example:
    code = re.sub(r"\r\n?", "\n", problem.code)
    return Example(
        prompt=prompt_of(problem.text, problem.tests),
        target=target_of(code),
        place=f"problem {problem.task_id}",
    )
