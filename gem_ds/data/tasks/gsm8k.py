r"""GSM8K: grade-school word problems with worked answers (Cobbe et al., arXiv 2110.14168).

    prompt = "Question: {question}\nAnswer:"        target = " " + answer

The answer keeps its calculator marks `<<48/2=24>>` and ends in `#### <number>`. Evaluation builds
its prompts with the same functions, so that a model is asked as it was taught.
"""

from __future__ import annotations

from pathlib import Path

from gem_ds.data.tasks import Example, Source, TaskData
from gem_ds.data.tasks.lines import Line, read_hub, read_jsonl

HUB_DATASET = "openai/gsm8k"


def prompt_of(question: str) -> str:
    """The prompt for one question, without any worked example before it."""
    return f"Question: {question}\nAnswer:"


def target_of(answer: str) -> str:
    """What the model should write after the prompt; it starts with the one separating space."""
    return f" {answer}"


def load(source: Source) -> TaskData:
    """Load train (7473) and test (1319), from `train.jsonl` and `test.jsonl` or from the Hub."""
    if source.data_dir is None:
        train, test = (read_hub((HUB_DATASET, "main"), split) for split in ("train", "test"))
    else:
        folder = Path(source.data_dir)
        train, test = (read_jsonl(folder / f"{split}.jsonl") for split in ("train", "test"))
    return TaskData(train=[*map(_example, train)], test=[*map(_example, test)])


def _example(line: Line) -> Example:
    return Example(prompt=prompt_of(line.text("question")), target=target_of(line.text("answer")))
