"""Metrics: by hand, and where a formula has no value; the file of predictions that they judge."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.data.metrics import METRICS, normalised, read_number, score
from gem_ds.data.predictions import judged
from gem_ds.data.tasks import AnswerExample, NumberExample
from gem_ds.data.tasks.catalog import TASKS
from tests.tiny_tasks import choice


def choices(answers, groups=None):
    groups, texts = groups or [""] * len(answers), (" 0", " 1", " 2")
    return [choice("p", texts, a, group=g) for a, g in zip(answers, groups, strict=True)]


def numbers(values):
    return [NumberExample(prompt="p", target="", pairs=(("p", "q"),), value=v) for v in values]


def squad(*answers):
    return [AnswerExample(prompt="p", target="", answers=a, passage="p") for a in answers]


def test_every_benchmark_task_has_metrics():
    assert set(METRICS) == {*TASKS, "squad"}
    first = {task: next(iter(measures)) for task, measures in METRICS.items()}
    f1 = {"multirc": "f1a", "record": "f1", "squad": "f1"}
    others = {"cola": "matthews_correlation", "stsb": "pearson"} | f1
    assert {task: metric for task, metric in first.items() if metric != "accuracy"} == others


#: 3 true positives, 1 true negative, 2 false positives, 1 false negative.
TRUTH = [1, 1, 1, 1, 0, 0, 0]
GUESS = [1, 1, 1, 0, 1, 1, 0]


def test_two_labels_by_hand():
    examples = choices(TRUTH)
    assert score("rte", examples, np.array(GUESS)) == {"accuracy": pytest.approx(4 / 7)}
    expected = {"accuracy": pytest.approx(4 / 7), "f1": pytest.approx(6 / 9)}
    assert score("mrpc", examples, GUESS) == expected
    assert score("qqp", examples, GUESS) == expected
    matthews = (3 * 1 - 2 * 1) / math.sqrt(5 * 4 * 3 * 2)
    assert score("cola", examples, GUESS) == {"matthews_correlation": pytest.approx(matthews)}


def test_cb_averages_the_f1_of_its_labels():
    """The rare label counts as much as the others: F1 of 4/5, 2/3 and 0."""
    result = score("cb", choices([0, 0, 1, 1, 2]), [0, 0, 1, 0, 1])
    macro_f1 = pytest.approx((4 / 5 + 1 / 2 + 0) / 3)
    assert result == {"accuracy": pytest.approx(3 / 5), "macro_f1": macro_f1}


def test_multirc_counts_answers_and_whole_questions():
    """Question a has one of two answers wrong, b and c are right; groups need not be adjacent."""
    examples = choices([1, 1, 0, 1, 0], groups=["a", "b", "a", "b", "c"])
    expected = {"f1a": pytest.approx(6 / 7), "exact_match": pytest.approx(2 / 3)}
    assert score("multirc", examples, [1, 1, 1, 1, 0]) == expected


def test_stsb_by_hand():
    """Ranks 1 2 3 4 against 1 3 2 4: Spearman 1 - 6 * 2 / (4 * 15) = 0.8."""
    truth, guess = [0.0, 1.0, 2.0, 5.0], [1.0, 3.0, 2.0, 4.0]
    result = score("stsb", numbers(truth), np.array(guess, dtype=np.float32))
    pearson = pytest.approx(np.corrcoef(truth, guess)[0, 1])
    assert result == {"pearson": pearson, "spearman": pytest.approx(0.8)}


def test_what_a_formula_leaves_undefined_counts_nothing():
    """Without a warning, which would be an error here, and never NaN."""
    for guess in (0, 1):
        for truth in (TRUTH, [guess] * 7):
            assert score("cola", choices(truth), [guess] * 7) == {"matthews_correlation": 0.0}
    for truth, guesses in (([1.0, 2.0], [2.5, 2.5]), ([2.0, 2.0], [1.0, 2.5]), ([2.0], [2.0])):
        assert score("stsb", numbers(truth), guesses) == {"pearson": 0.0, "spearman": 0.0}
    assert score("mrpc", choices([0, 0]), [0, 0]) == {"accuracy": 1.0, "f1": 0.0}
    assert score("multirc", choices([0, 0]), [0, 0]) == {"f1a": 0.0, "exact_match": 1.0}


def test_squad_takes_the_answer_that_fits_best():
    examples = squad(("the Denver Broncos", "Broncos"), ("1,000 men",), ("cat",))
    result = score("squad", examples, ["Denver  Broncos!", "about 1000 men", ""])
    f1 = pytest.approx((1 + 2 * (2 / 3) * 1 / (2 / 3 + 1) + 0) / 3)
    assert result == {"f1": f1, "exact_match": pytest.approx(1 / 3)}


NAMES = (" Darius Henderson", " Lee", " the Henderson", " Henderson Road")


@pytest.mark.parametrize(
    ("task", "answers", "expected"),
    [
        ("copa", (), [1, 0, 0, 0]),
        ("record", ("Darius Henderson", "Henderson"), [1, 0, 1, 2 / 3]),
    ],
)
def test_predictions_are_judged_as_the_main_metric_averages_them(task, answers, expected):
    """The comparison's intervals are those of this mean and stand beside the metric."""
    predictions = [0, 1, 2, 3, 3]
    asked = [choice("p", NAMES, 0, answers=answers)] * 5
    lines = judged(asked, predictions)
    assert [(line["id"], line["prediction"]) for line in lines] == list(enumerate(predictions))
    correct = [line["correct"] for line in lines]
    assert correct == pytest.approx([*expected, expected[3]])
    metrics = score(task, asked, predictions)
    assert next(iter(metrics.values())) == pytest.approx(sum(correct) / 5)
    assert metrics.get("exact_match", 2 / 5) == 2 / 5


def test_a_number_is_neither_right_nor_wrong():
    (written,) = judged(numbers([2.0]), [2.0])
    assert written == {"id": 0, "prediction": 2.0, "reference": 2.0, "correct": None}


def test_text_is_normalised_as_the_official_script_does():
    texts = ["The Cat.", "  an  apple\na day ", "theatre", "well-known", "Ana\u2019s", "The"]
    expected = ["cat", "apple day", "theatre", "wellknown", "ana\u2019s", ""]
    assert [normalised(text) for text in texts] == expected


@pytest.mark.parametrize(
    ("expected", "texts"),
    [
        (0.0, ["-1"]),
        (0.08, [" 4/50"]),
        (0.5, [" 1/2"]),
        (2.0, ["2.0\nSentence 1: 5"]),
        (2.5, ["very similar", ""]),
        (3.6, [" 3.6 / 5."]),
        (3.8, [" 3.8", "3 4/5", "3\u2158"]),
        (4.0, [" 4/5", "4 / 5.00"]),
        (5.0, ["7", "9" * 400]),
    ],
)
def test_a_number_is_read_from_what_a_model_wrote(expected, texts):
    for text in texts:
        assert read_number(text) == expected


@pytest.mark.parametrize(
    ("task", "examples", "predictions", "message"),
    [
        ("gsm8k", choices([0]), [0], r"gsm8k has no metric here: there are those of cola"),
        ("rte", choices([0, 1]), [0], r"2 examples and 1 predictions"),
        ("rte", [], [], r"at least one"),
        ("rte", choices([0, 1]), [0, 3], r"Example 2 of rte cannot have the answer 3"),
        ("rte", choices([0]), [-1], r"Example 1 of rte cannot have the answer -1"),
        ("stsb", numbers([1.0]), [math.nan], r"Example 1 of stsb cannot have the answer nan"),
        ("squad", squad(("a",)), [1], r"Example 1 of squad cannot have the answer 1"),
    ],
)
def test_what_cannot_be_judged_is_refused(task, examples, predictions, message):
    with pytest.raises(ValueError, match=message):
        score(task, examples, predictions)


GUESSES = st.tuples(st.floats(0, 5), st.floats(-1e300, 1e300, allow_subnormal=False))


@settings(max_examples=30, deadline=None)
@given(st.lists(GUESSES, min_size=1))
def test_correlations_have_a_value_whatever_is_predicted(pairs):
    truth, guess = zip(*pairs, strict=True)
    for value in score("stsb", numbers(truth), guess).values():
        assert -1.0 - 1e-9 <= value <= 1.0 + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.text(), st.text(min_size=1))
def test_a_text_against_itself_and_another(text, answer):
    result = score("squad", squad((answer,)), [text])
    assert 0.0 <= result["exact_match"] <= 1.0
    assert 0.0 <= result["f1"] <= 1.0
    itself = score("squad", squad(("x", answer)), [answer])
    assert itself["exact_match"] == 1.0
    assert itself["f1"] == pytest.approx(1.0 if normalised(answer) else 0.0)
    if result["exact_match"] and normalised(answer):
        assert result["f1"] == pytest.approx(1.0)
