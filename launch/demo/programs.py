"""The bundled programming tasks: small functions of one number, in MBPP's own JSONL form.

Most are of the kinds in the pretraining text (`corpus.py`), where the body follows from the name.
Some go beyond it: factors above five and limits above 35. And the name `scale_and_add_7` does not
say by what to multiply: one can only guess one of three factors. So the embedded model gets some
right, some wrong, and some by luck. It has never seen MBPP's prompt: with `--prompt_template
'{header}'` it is asked as it was taught, and goes on where the header of the function ends.

    python -m launch.demo.programs --output_dir launch/demo/programs
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

from launch.demo.corpus import DIGIT_WORDS
from launch.demo.task import write_lines

FIRST_ID = 11  # of MBPP's test split

Row = dict[str, object]


def main(argv: list[str] | None = None) -> None:
    """Write `mbpp.jsonl`."""
    parser = argparse.ArgumentParser(prog="launch.demo.programs", description=__doc__)
    parser.add_argument("--output_dir", required=True, help="folder to write the file to")
    parser.add_argument("--seed", type=int, default=31, help="fixes the numbers in the tests")
    args = parser.parse_args(argv)
    write_lines(Path(args.output_dir, "mbpp.jsonl"), generate_rows(args.seed))


def generate_rows(seed: int) -> list[Row]:
    """All 40 tasks, each a mapping with the fields of MBPP's full set."""
    rng = random.Random(seed)
    functions = [
        *(_add(n) for n in range(1, 11)),
        *(_times(n) for n in range(2, 10)),
        *(_limit(n) for n in range(6, 59, 4)),
        *(_scale(2 + i % 3, n) for i, n in enumerate(range(3, 18, 2))),
    ]
    return [_row(rng, task_id, each) for task_id, each in enumerate(functions, start=FIRST_ID)]


#: What is asked for, the name, the expression that it returns, and that expression's value.
Function = tuple[str, str, str, Callable[[int], int]]


def _add(n: int) -> Function:
    return f"adds {n} to a number", f"add_{DIGIT_WORDS[n - 1]}", f"x + {n}", lambda x: x + n


def _times(n: int) -> Function:
    name = f"times_{DIGIT_WORDS[n - 1]}"
    return f"multiplies a number by {n}", name, f"{n} * x", lambda x: n * x


def _limit(n: int) -> Function:
    text = f"returns a number, or {n} if the number is larger"
    return text, f"at_most_{n}", f"min(x, {n})", lambda x: min(x, n)


def _scale(factor: int, n: int) -> Function:
    text = f"multiplies a number by {factor} and adds {n}"
    return text, f"scale_and_add_{n}", f"{factor} * x + {n}", lambda x: factor * x + n


def _row(rng: random.Random, task_id: int, asked: Function) -> Row:
    """A task whose tests have a small, a middle and a large argument, as a limit lies between."""
    text, name, expression, function = asked
    arguments = (rng.randint(1, 5), rng.randint(6, 30), rng.randint(61, 90))
    return {
        "text": f"Write a function that {text}.",
        "code": f"def {name}(x):\n    return {expression}",
        "task_id": task_id,
        "test_setup_code": "",
        "test_list": [f"assert {name}({x}) == {function(x)}" for x in arguments],
        "challenge_test_list": [],
    }


if __name__ == "__main__":
    main()
