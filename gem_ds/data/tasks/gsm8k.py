r"""GSM8K: grade-school word problems with worked answers (Cobbe et al., arXiv 2110.14168).

    prompt = "Question: {question}\nAnswer:"        target = " " + answer

The answer keeps its calculator marks `<<48/2=24>>` and ends in `#### <number>`.
"""

from pathlib import Path

from gem_ds.data.tasks import Example, Source, TaskData
from gem_ds.data.tasks.lines import Line, read_jsonl
from gem_ds.data.tasks.published import read_hub

HUB_DATASET = "openai/gsm8k"


def load(source: Source) -> TaskData:
    """Load train (7473) and test (1319), from `train.jsonl` and `test.jsonl` or from the Hub."""
    train, test = (
        read_hub((HUB_DATASET, "main"), split)
        if source.data_dir is None
        else read_jsonl(Path(source.data_dir, f"{split}.jsonl"))
        for split in ("train", "test")
    )
    return TaskData(train=[*map(_example, train)], test=[*map(_example, test)])


def _example(line: Line) -> Example:
    prompt = f"Question: {line.text('question')}\nAnswer:"
    return Example(prompt=prompt, target=f" {line.text('answer')}", place=line.place)
