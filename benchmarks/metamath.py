r"""Make the data of PEFT's comparison of methods: trained on MetaMathQA, scored on GSM8K.

    python benchmarks/metamath.py OUTPUT_DIR [--metamath FOLDER] [--gsm8k FOLDER]

PEFT's ``method_comparison/MetaMathQA`` leaves out examples whose query and response have more than
1,300 characters together, and asks ``Question: {query} Think step by step.\nAnswer:``. The folder
that this writes has the form of GSM8K with questions that end so: ``--task gsm8k --data_dir
OUTPUT_DIR`` trains on it, and ``python -m eval.gsm8k --data_dir OUTPUT_DIR`` asks GSM8K's test
problems likewise. What differs from PEFT's program: the loss is of the answers alone, not of the
questions too; a space stands before an answer; all of the filtered examples may be drawn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from datasets import load_dataset

from gem_ds.data.tasks.gsm8k import HUB_DATASET
from gem_ds.files.manifest import atomic_folder

MAX_CHARACTERS = 1300
SUFFIX = " Think step by step."


def main(argv: Sequence[str] | None = None) -> None:
    """Read both datasets, from the Hub or from folders, and write the folder."""
    parser = argparse.ArgumentParser(prog="benchmarks/metamath.py", description=__doc__)
    parser.add_argument("output_dir", type=Path, help="folder to create")
    parser.add_argument("--metamath", default="meta-math/MetaMathQA", help="Hub id or folder")
    parser.add_argument("--gsm8k", type=Path, help="folder that holds GSM8K's test.jsonl")
    args = parser.parse_args(argv)
    if args.output_dir.exists():
        raise ValueError(f"{args.output_dir} exists: choose another folder.")
    metamath = load_dataset(args.metamath, split="train")
    if args.gsm8k:
        gsm8k = load_dataset("json", data_files=str(args.gsm8k / "test.jsonl"), split="train")
    else:
        gsm8k = load_dataset(HUB_DATASET, "main", split="test")
    args.output_dir.parent.mkdir(parents=True, exist_ok=True)

    kept = [row for row in metamath if is_short(row["query"], row["response"])]
    train = [{"question": row["query"] + SUFFIX, "answer": row["response"]} for row in kept]
    test = [{**row, "question": row["question"] + SUFFIX} for row in gsm8k]

    def write(folder: Path) -> None:
        write_jsonl(folder / "train.jsonl", train)
        write_jsonl(folder / "test.jsonl", test)

    atomic_folder(args.output_dir, write)
    print(f"{len(train):,} of {len(metamath):,} examples of MetaMathQA are short enough.")


def is_short(query: str, response: str) -> bool:
    """Whether PEFT's comparison keeps an example."""
    return len(f"{query} {response}") <= MAX_CHARACTERS


def write_jsonl(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write a line of JSON for each row."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
