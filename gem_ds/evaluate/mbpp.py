r"""MBPP as it is asked and answered: the prompts, the stops, and the program of a completion.

    three shots     tasks 2, 3 and 4 with solution and `\n[DONE]`, each with a blank line after it
    zero shots      the task alone, for a model that was fine-tuned on the train split
    a template      the user's own, for models that know another form

Shots and stop are those of the dataset's README and, to the byte, of the community harness
(lm-evaluation-harness, task mbpp). The harness runs a completion as it stands; here the program is
looked for first (`gem_ds.evaluate.extraction`), as chat models wrap it in words and fences.

With `{header}` in a template, as HumanEval asks, the prompt ends inside the program, which begins
at the header and goes on until a line stands at the margin again.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from gem_ds.data.tasks import Prompt
from gem_ds.data.tasks.mbpp import Dataset, Problem, load_problems, prompt_of, target_of
from gem_ds.evaluate.extraction import extract_program
from gem_ds.evaluate.prompt_form import DEFAULT_FORM, PromptForm
from gem_ds.evaluate.sandbox import Program
from gem_ds.evaluate.syntax import tree_of
from gem_ds.flags import option

SHOT_IDS = (2, 3, 4)
STOP_STRINGS = ("[DONE]",)
#: Where a completion has left the function that it continues.
MARGIN_STOP_STRINGS = ("\ndef ", "\nclass ", "\nprint", "\nassert ", "\nif ", "\n#", "\n@", "\n```")

_PLACEHOLDER = re.compile(r"\{(text|tests|header)\}")
#: A closing bracket at the margin ends an expression, not the function.
_MARGIN = re.compile(r"\n(?=[^\s)\]}])")


@dataclass(frozen=True, kw_only=True)
class MbppArguments:
    """The flags that say which problems are asked, and how."""

    sanitized: bool = option(False, "The sanitized set (427 problems), not the full one (974).")
    split: Literal["test", "validation", "train"] = option("test", "Which problems.")
    prompt_template: str | None = option(
        None,
        "Another prompt than MBPP's, with {text}, {tests} or {header} in it; from {header} on, "
        "for example `def f(x):`, the prompt is the beginning of the program.",
    )


def load(data_dir: str | None, limit: int | None, flags: MbppArguments) -> Mbpp:
    """The problems of the split, or the first `limit` of them; raises ValueError."""
    dataset = load_problems(data_dir, sanitized=flags.sanitized)
    problems = {f"mbpp/{p.task_id}": p for p in dataset.split(flags.split)[:limit]}
    return Mbpp(dataset=dataset, problems=problems, flags=flags)


@dataclass(frozen=True, kw_only=True)
class Mbpp:
    """The benchmark (`gem_ds.evaluate.passk.Benchmark`); its shots come from the dataset."""

    dataset: Dataset
    problems: dict[str, Problem]
    flags: MbppArguments

    @property
    def data_sha256(self) -> dict[str, str]:
        """What tells the data from others."""
        return {self.dataset.source: self.dataset.sha256}

    def stop_strings(self, form: PromptForm = DEFAULT_FORM) -> tuple[str, ...]:
        """The protocol's mark, or what leaves the function that a header began."""
        continues = "{header}" in (self.flags.prompt_template or "")
        return MARGIN_STOP_STRINGS if continues else STOP_STRINGS

    def num_fewshot(self, wanted: int | None) -> int:
        """By default 3, and 0 with a template, which says nothing about shots."""
        if self.flags.prompt_template is not None and wanted is not None:
            raise ValueError(
                "--num_fewshot has no meaning with --prompt_template: write examples into the "
                "template."
            )
        if wanted not in (None, 0, 3):
            raise ValueError(f"--num_fewshot must be 0 or 3, not {wanted}.")
        default = 3 if self.flags.prompt_template is None else 0
        return default if wanted is None else wanted

    def num_shown(self, prompt: str) -> int:
        """Each worked problem is closed by the mark."""
        closed = f"{STOP_STRINGS[0]}\n\n"
        return 3 if self.flags.prompt_template is None and closed in prompt else 0

    def prompts(self, num_fewshot: int, form: PromptForm = DEFAULT_FORM) -> dict[str, Prompt]:
        """By task id; ValueError if the dataset lacks a shot or the template cannot be filled."""
        if (template := self.flags.prompt_template) is not None:
            if _PLACEHOLDER.search(template) is None:
                raise ValueError(
                    "--prompt_template names none of {text}, {tests} and {header}, so that every "
                    "problem would get the same prompt: put one of them in."
                )
            if form.apply_chat_template and "{header}" in template:
                raise ValueError(
                    "A prompt that ends inside the program, at {header}, is no message of a chat: "
                    "leave {header} out of --prompt_template, or --apply_chat_template."
                )
            problems = self.problems.items()
            return {name: form.prompt(template_prompt(p, template), []) for name, p in problems}
        ids = SHOT_IDS[:num_fewshot]
        for task_id in ids:
            if task_id not in self.dataset.problems:
                raise ValueError(
                    f"{self.dataset.source} lacks problem {task_id}, which the prompt of "
                    f"{num_fewshot} shots shows: pass the whole file, or --num_fewshot 0."
                )
        shots = [self.dataset.problems[task_id] for task_id in ids]
        return {name: few_shot_prompt(p, shots, form) for name, p in self.problems.items()}

    def program(self, task_id: str, completion: str) -> Program:
        """What is run for a completion; none fails."""
        problem, template = self.problems[task_id], self.flags.prompt_template
        entry_point = entry_point_of(problem)
        if template is not None and "{header}" in template:
            begun = template_prompt(problem, template[template.index("{header}") :])
            source = begun + _MARGIN.split(completion, maxsplit=1)[0]
        else:
            source = extract_program(completion, entry_point)
        return Program(source, problem.tests, setup=problem.setup, entry_point=entry_point)

    def protocol(self, num_fewshot: int) -> dict[str, Any]:
        """How it is asked."""
        return {
            "split": self.flags.split,
            "sanitized": self.flags.sanitized,
            "num_fewshot": num_fewshot,
            "prompt_template": self.flags.prompt_template,
        }


def few_shot_prompt(
    problem: Problem, shots: list[Problem], form: PromptForm = DEFAULT_FORM
) -> Prompt:
    """The prompt of the protocol; `shots` are worked problems that go before, none for zero."""
    worked = [(prompt_of(shot.text, shot.tests), target_of(shot.code)) for shot in shots]
    return form.prompt(prompt_of(problem.text, problem.tests), worked)


def template_prompt(problem: Problem, template: str) -> str:
    """A template with `{text}`, `{tests}` and `{header}` replaced; other braces stand."""
    values: dict[str, Callable[[], str]] = {
        "header": lambda: header_of(problem),
        "text": lambda: problem.text,
        "tests": lambda: "\n".join(problem.tests),
    }
    return _PLACEHOLDER.sub(lambda match: values[match[1]](), template)


@cache
def entry_point_of(problem: Problem) -> str | None:
    """The function of the reference solution that the tests call, None unless there is just one."""
    solution, tests = tree_of(problem.code), tree_of("\n".join(problem.tests))
    if solution is None or tests is None:
        return None
    calls = [node.func for node in ast.walk(tests) if isinstance(node, ast.Call)]
    called = {function.id for function in calls if isinstance(function, ast.Name)}
    found = called & {node.name for node in solution.body if isinstance(node, ast.FunctionDef)}
    return found.pop() if len(found) == 1 else None


def header_of(problem: Problem) -> str:
    """`def name(arguments):` of the entry point, without annotations."""
    name, solution = entry_point_of(problem), tree_of(problem.code)
    if name is None or solution is None:
        raise ValueError(
            f"The tests of problem {problem.task_id} do not call one function of its solution, so "
            "there is no {header} to prompt with: leave it out of --prompt_template."
        )
    functions = [node for node in solution.body if isinstance(node, ast.FunctionDef)]
    arguments = [node.args for node in functions if node.name == name][-1]
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    return f"def {name}({ast.unparse(arguments)}):"
