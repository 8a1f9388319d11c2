"""The file of predictions: what it says of each example is what the task's metric averages."""

import json
from pathlib import Path

import pytest

from gem_ds.data.metrics import score
from gem_ds.data.predictions import save_predictions
from gem_ds.data.tasks import Example, NumberExample
from tests.tiny_tasks import choice

NAMES = (" Darius Henderson", " Lee", " the Henderson", " Henderson Road")
PREDICTIONS = [0, 1, 2, 3, 3]


def correct_of(folder: Path, examples: list[Example], predictions: list[float]) -> list[float]:
    save_predictions(folder, examples, predictions)
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [(line["id"], line["prediction"]) for line in lines] == list(enumerate(predictions))
    return [line["correct"] for line in lines]


@pytest.mark.parametrize(
    ("task", "answers", "expected"),
    [
        ("copa", (), [1, 0, 0, 0, 0]),
        ("record", ("Darius Henderson", "Henderson"), [1, 0, 1, 2 / 3, 2 / 3]),
    ],
)
def test_the_mean_of_what_is_correct_is_the_main_metric(tmp_path, task, answers, expected):
    """The comparison's intervals are those of this mean and stand beside the metric."""
    pairs = (("p", "q"),) * len(NAMES)
    asked = [choice("p", NAMES, 0, pairs, answers=answers)] * len(PREDICTIONS)
    correct = correct_of(tmp_path, asked, PREDICTIONS)
    assert correct == pytest.approx(expected)
    main = next(iter(score(task, asked, PREDICTIONS).values()))
    assert sum(correct) / len(correct) == pytest.approx(main)


def test_a_number_is_neither_right_nor_wrong(tmp_path):
    asked = NumberExample(prompt="p", target=" 2.0", pairs=(("p", "q"),), value=2.0)
    assert correct_of(tmp_path, [asked], [2.0]) == [None]
