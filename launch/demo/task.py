"""The bundled task: comparison problems in GSM8K's JSONL form, generated from a seed.

Every problem gives one quantity, states a second one relative to it ("17 more than", "8 fewer
than", "3 times as many as") and asks for both together. The solution has a line for the second
quantity, one for the sum, and `#### N`. The pretraining text (`corpus.py`) has neither the
comparison nor the ending, but the parts: copying numbers, the operations, solving step by step. No
two problems share both numbers and the comparison: the test part asks for equations that are new.

    python -m launch.demo.task --output_dir launch/demo/task
"""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.demo.corpus import DAYS, DONE_BY_THE_DAY, ITEMS, NAMES

Example = dict[str, str]


def main(argv: list[str] | None = None) -> None:
    """Write `train.jsonl` and `test.jsonl`."""
    parser = argparse.ArgumentParser(prog="launch.demo.task", description=__doc__)
    parser.add_argument("--output_dir", required=True, help="folder to write the two files to")
    parser.add_argument("--seed", type=int, default=29, help="fixes the problems")
    parser.add_argument("--train_examples", type=int, default=2000, help="problems to train on")
    parser.add_argument("--test_examples", type=int, default=200, help="problems held out")
    args = parser.parse_args(argv)

    examples = generate_examples(args.seed, args.train_examples + args.test_examples)
    write_lines(Path(args.output_dir, "train.jsonl"), examples[: args.train_examples])
    write_lines(Path(args.output_dir, "test.jsonl"), examples[args.train_examples :])


def write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write a file of one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def generate_examples(seed: int, count: int) -> list[Example]:
    """`count` different problems, each a mapping with `question` and `answer`."""
    comparisons = [  # sign, first quantity, number that relates the second one to it
        *(("+", first, by) for first in range(10, 60) for by in range(2, 30)),
        *(("-", first, by) for first in range(10, 60) for by in range(2, min(30, first))),
        *(("*", first, by) for first in range(3, 21) for by in range(2, 10)),
    ]
    if not 0 <= count <= len(comparisons):
        raise ValueError(
            f"The task has {len(comparisons)} different problems and {count} were asked for; "
            "lower --train_examples or --test_examples."
        )
    rng = random.Random(seed)
    return [_example(rng, *comparison) for comparison in rng.sample(comparisons, count)]


def _example(rng: random.Random, sign: str, first: int, by: int) -> Example:
    second = {"+": first + by, "-": first - by, "*": first * by}[sign]
    relation = {"+": f"{by} more", "-": f"{by} fewer", "*": f"{by} times as many"}[sign]
    link = "as" if sign == "*" else "than"
    answer = f"{first}{sign}{by}={second}\n{first}+{second}={first + second}\n#### {first + second}"
    return {"question": _question(rng, first, relation, link), "answer": answer}


def _question(rng: random.Random, first: int, relation: str, link: str) -> str:
    item = rng.choice(ITEMS)
    frame = rng.randrange(3)
    if frame == 0:
        name, (day, other) = rng.choice(NAMES), rng.sample(DAYS, 2)
        story = f"On {day} {name} {rng.choice(DONE_BY_THE_DAY)} {first} {item}."
        story = f"{story} On {other} it was {relation} {link} on {day}."
        return f"{story} How many {item} was that on both days?"
    if frame == 1:
        name, other = rng.sample(NAMES, 2)
        story = f"{name} has {first} {item}. {other} has {relation} {link} {name}."
        return f"{story} How many {item} do they have together?"
    one, other = rng.sample(("box", "bag", "basket", "jar"), 2)
    story = f"In the {one} are {first} {item}. In the {other} are {relation} {link} in the {one}."
    return f"{story} How many {item} are there in all?"


if __name__ == "__main__":
    main()
