"""How answers to a benchmark's examples are measured: the metrics that each benchmark defines.

Values lie in [0, 1], correlations in [-1, 1]. What a formula leaves undefined counts 0.0: the
correlation with a constant, F1 where a class is neither predicted nor there.

F1 of labels is that of "equivalent", "duplicate", "this answer is correct"; macro F1 averages over
the labels that occur, unweighted. Texts are compared by their words with the answer that fits best,
normalised as in SQuAD's official script, which ReCoRD's and SuperGLUE's do too. `mnli` is the
matched validation set and `mnli_mismatched` the other; each is a task of its own.
"""

import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from gem_ds.data.numbers import cleaned, find_numbers
from gem_ds.data.tasks import ChoiceExample, Example, NumberExample
from gem_ds.data.tasks.catalog import TASKS
from gem_ds.data.tasks.classification import SCALE

_OUT_OF_FIVE = re.compile(  # but for the fifths of a mixed number, 3 4/5
    rf"(?<![0-9]\s[0-9])\s*/\s*{SCALE[1]:g}(?:\.0+)?(?!\.?[0-9])"
)

_AS_LABELS = "cb"  # the task whose metrics own labels have

#: Examples and what was predicted for each -> the value.
Measure = Callable[[Sequence[Any], Sequence[Any]], float]


def score(
    task: str,
    examples: Sequence[Example],
    predictions: Sequence[int] | Sequence[float] | Sequence[str],
) -> dict[str, float]:
    """Every metric of a task of `METRICS` by name, the main one first; of own labels those of cb.

    Of each example a prediction is the index of a candidate; for stsb a number; for squad a text.

    Raises:
        ValueError: The task has no metric, there is nothing to judge, or a prediction is missing or
            impossible.
    """
    task = _AS_LABELS if task == "jsonl" else task
    if task not in METRICS:
        raise ValueError(f"{task} has no metric here: there are those of {', '.join(METRICS)}.")
    if not examples or len(examples) != len(predictions):
        raise ValueError(
            f"{task} has {len(examples)} examples and {len(predictions)} predictions: there must "
            f"be one for each, and at least one."
        )
    for number, (example, prediction) in enumerate(zip(examples, predictions, strict=True), 1):
        if not _is_possible(example, prediction):
            raise ValueError(f"Example {number} of {task} cannot have the answer {prediction!r}.")
    return {name: measure(examples, predictions) for name, measure in METRICS[task].items()}


def read_number(text: str) -> float:
    """The number that a model wrote for stsb, moved to the nearest end of the scale if outside.

    It is the first number in the text, "4/5" being 4 out of 5. A text without one counts as the
    middle, 2.5: a model that does not answer must be given a number, and this one says the least.
    """
    low, high = map(Fraction, SCALE)
    numbers = find_numbers(_OUT_OF_FIVE.sub("", cleaned(text)))
    if not numbers or (value := numbers[0].value) is None:
        return float((low + high) / 2)
    return float(min(max(value, low), high))


def _of_labels(measure: Callable[..., Any], **options: Any) -> Measure:
    """A measure of the right labels against the predicted ones."""
    return lambda examples, predictions: float(
        measure([example.answer for example in examples], predictions, **options)
    )


def _of_numbers(correlate: Callable[..., Any]) -> Measure:
    """A correlation of the right numbers with the predicted ones."""
    return lambda examples, predictions: _correlation(
        lambda *values: correlate(*values).statistic,
        [example.value for example in examples],
        np.asarray(predictions, dtype=np.float64),
    )


def _of_texts(compare: Callable[[str, str], float]) -> Measure:
    """The mean over the predictions, each against the accepted answer that it fits best."""

    def measure(examples: Sequence[Any], predictions: Sequence[Any]) -> float:
        total = 0.0
        for example, prediction in zip(examples, predictions, strict=True):
            is_choice = isinstance(example, ChoiceExample)
            text = normalised(example.candidates[prediction] if is_choice else prediction)
            total += max(compare(text, normalised(answer)) for answer in example.answers)
        return total / len(examples)

    return measure


def _correlation(correlate: Callable[..., float], truth: Sequence[Any], guess: Any) -> float:
    if len(set(truth)) < 2 or len(set(guess)) < 2:
        return 0.0
    with warnings.catch_warnings():  # of numbers that differ by rounding only
        warnings.simplefilter("ignore")
        value = float(correlate(truth, guess))
    return value if np.isfinite(value) else 0.0


def group_exact_match(examples: Sequence[ChoiceExample], predictions: Sequence[int]) -> float:
    """Share of the groups all of whose examples are right."""
    groups: dict[str, bool] = {}
    for example, prediction in zip(examples, predictions, strict=True):
        is_right = prediction == example.answer
        groups[example.group] = groups.get(example.group, True) and is_right
    return sum(groups.values()) / len(groups)


def normalised(text: str) -> str:
    """The text in lower case without punctuation (ASCII), articles and spare white space."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _word_f1(text: str, answer: str) -> float:
    words, wanted = text.split(), answer.split()
    num_common = (Counter(words) & Counter(wanted)).total()
    if not num_common:
        return 0.0
    precision, recall = num_common / len(words), num_common / len(wanted)
    return 2 * precision * recall / (precision + recall)


accuracy = _of_labels(accuracy_score)
f1 = _of_labels(f1_score, zero_division=0.0)
text_f1 = _of_texts(_word_f1)
text_exact_match = _of_texts(lambda text, answer: float(text == answer))

#: By task its metrics, the main one first.
METRICS: Mapping[str, Mapping[str, Measure]] = {
    **{task: {"accuracy": accuracy} for task in TASKS},
    "cola": {"matthews_correlation": _of_labels(partial(_correlation, matthews_corrcoef))},
    "mrpc": {"accuracy": accuracy, "f1": f1},
    "qqp": {"accuracy": accuracy, "f1": f1},
    "stsb": {"pearson": _of_numbers(stats.pearsonr), "spearman": _of_numbers(stats.spearmanr)},
    "cb": {
        "accuracy": accuracy,
        "macro_f1": _of_labels(f1_score, average="macro", zero_division=0.0),
    },
    "multirc": {"f1a": f1, "exact_match": group_exact_match},
    "record": {"f1": text_f1, "exact_match": text_exact_match},
    "squad": {"f1": text_f1, "exact_match": text_exact_match},
}


def _is_possible(example: Example, prediction: object) -> bool:
    if isinstance(example, ChoiceExample):
        is_index = isinstance(prediction, (int, np.integer))
        return is_index and 0 <= prediction < len(example.candidates)  # type: ignore[operator]
    if isinstance(example, NumberExample):
        return isinstance(prediction, (int, float, np.number)) and bool(np.isfinite(prediction))
    return isinstance(prediction, str)
