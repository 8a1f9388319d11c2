"""The file of predictions that are no text: labels, choices, numbers.

    predictions.jsonl    {"id": 17, "prediction": 0, "reference": 1, "correct": 0.0}

`prediction` and `reference` are indices of candidates, or numbers; a number is neither right nor
wrong (`correct` is null). An example that accepts several texts (record) has one of its candidates
as reference, and as `correct` the F1 of the words, whose mean is the task's main metric.
"""

from collections.abc import Sequence
from typing import Any

from gem_ds.data.metrics import text_f1
from gem_ds.data.tasks import ChoiceExample, Example, NumberExample

PREDICTIONS_FILE = "predictions.jsonl"


def judged(examples: Sequence[Example], predictions: Sequence[float]) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl, one for each example in their order."""
    lines = []
    for i, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
        reference, correct = _judged(example, prediction)
        line = {"id": i, "prediction": prediction, "reference": reference, "correct": correct}
        lines.append(line)
    return lines


def _judged(example: Example, prediction: float) -> tuple[float, float | None]:
    if isinstance(example, NumberExample):
        return example.value, None
    assert isinstance(example, ChoiceExample)
    if example.answers:
        return example.answer, text_f1([example], [int(prediction)])
    return example.answer, float(prediction == example.answer)
