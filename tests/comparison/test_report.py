"""Tables: units, averages, and what is said where something cannot be computed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gem_ds.comparison.cells import Cell, folder_of
from gem_ds.comparison.grid import Comparison, Evaluation, Method, Task
from gem_ds.comparison.markdown import byte_text, markdown
from gem_ds.comparison.rates import Choice
from gem_ds.comparison.results import (
    COSTS,
    Result,
    read_predictions,
    read_result,
    read_training,
)
from gem_ds.comparison.table import Row, averages, compare_methods, mean_and_std
from gem_ds.comparison.unit import Unit

NO_CHOICE = Choice(rates=(0.1,), scores=(None,), metric=None, rate=0.1)


def cell_of(task: str, method: str, seed: int) -> Cell:
    return Cell(task=task, method=method, learning_rate=0.1, seed=seed, split="test")


def row_of(task: str, method: str, metric: str, scores: dict[int, float], failed: int = 0) -> Row:
    costs = dict.fromkeys(COSTS, 1.0)
    return Row(
        task=task,
        method=method,
        choice=NO_CHOICE,
        results={
            cell_of(task, method, seed): Result(metric=metric, score=score, loss=1.0, costs=costs)
            for seed, score in scores.items()
        },
        num_failed=failed,
    )


def comparison_in(folder: Path, **tasks: Task) -> Comparison:
    method = Method(learning_rates=(0.1,))
    return Comparison(
        output_dir=folder,
        methods={"gem": method, "full": method},
        tasks=tasks,
        seeds=(1, 2),
        dev_examples=5,
    )


def save_predictions(comparison: Comparison, cell: Cell, rows: list[dict]) -> None:
    folder = folder_of(comparison, cell)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "predictions.jsonl").write_text(text, encoding="utf-8")


def test_a_metric_is_written_in_its_unit() -> None:
    assert Unit("accuracy").write_all([0.5, 0.52]) == "51.0 ± 1.4"
    assert Unit("accuracy").label == "accuracy (%)"
    assert Unit("matthews_correlation").write_all([0.5]) == "0.500"
    assert Unit("eval_loss").write(1.23456, sign=True) == "+1.235"
    assert Unit("accuracy").write(-0.00001, sign=True) == "0.0"
    assert [byte_text(2.0**k) for k in (3, 14, 24, 33)] == ["8 B", "16 KiB", "16 MiB", "8.0 GiB"]


def test_an_average_is_over_tasks_within_each_seed() -> None:
    rows = [
        row_of("a", "gem", "accuracy", {1: 0.2, 2: 0.4}),
        row_of("a", "full", "accuracy", {1: 0.5}, failed=1),
        row_of("b", "gem", "f1", {1: 0.4, 2: 0.8}),
        row_of("b", "full", "f1", {1: 0.5, 2: 0.5}),
    ]
    found = averages(rows, 2)
    assert found["gem"] == pytest.approx([0.3, 0.6])
    assert found["full"] == []  # one of its runs is missing
    assert averages(rows, 1) == {}
    assert averages([*rows, row_of("c", "gem", "eval_loss", {1: 2.0})], 3) == {}
    mean, std = mean_and_std([0.3, 0.6])
    assert (mean, std) == pytest.approx((0.45, 0.3 / math.sqrt(2)))
    assert math.isnan(mean_and_std([1.0])[1])


def test_differences_that_cannot_be_computed_say_why(tmp_path: Path) -> None:
    comparison = comparison_in(tmp_path, a=Task())
    loss = [row_of("a", method, "eval_loss", {1: 2.0}) for method in ("gem", "full")]
    found = compare_methods(comparison, loss)
    assert found is not None
    assert found.note == "Not computed: the bootstrap needs one metric, which is no loss."
    missing = [row_of("a", method, "accuracy", {1: 0.5}) for method in ("gem", "full")]
    found = compare_methods(comparison, missing)
    assert found is not None
    assert "predictions.jsonl cannot be read" in found.note
    assert compare_methods(comparison, missing[:1]) is None
    text = markdown(comparison, missing, {"a": found}, {})
    assert "### Difference from gem\n\nNot computed: " in text


def test_a_bootstrap_of_another_quantity_than_the_metric_says_so(tmp_path: Path) -> None:
    comparison = comparison_in(tmp_path, a=Task())
    answers = [
        {"id": i, "correct": i % 2, "prediction": "\u2028", "reference": 0} for i in range(4)
    ]
    for method in ("gem", "full"):
        save_predictions(comparison, cell_of("a", method, 1), answers)
    for score, note in ((0.5, ""), (0.6, "Of the share of right answers, which is not the metric")):
        rows = [row_of("a", method, "exact_match", {1: score}) for method in ("full", "gem")]
        found = compare_methods(comparison, rows)
        assert found is not None
        assert found.reference == "gem"  # wherever it stands
        assert found.note.startswith(note)
        assert bool(found.note) == bool(note)
        text = markdown(comparison, rows, {"a": found}, {})
        assert "Intervals are not corrected for the number of comparisons." in text


def test_a_pipe_in_a_log_does_not_break_the_report(tmp_path: Path) -> None:
    comparison = comparison_in(tmp_path, a=Task())
    rows = [row_of("a", "gem", "accuracy", {1: 0.5, 2: 0.5})]
    text = markdown(comparison, rows, {}, {cell_of("a", "full", 1): "a|b"})
    assert "## Failed runs\n\n* a full at 1e-01, seed 1, test: a|b" in text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"eval_metrics": {}}, "has neither eval_metrics nor last_eval_loss"),
        ({"eval_metrics": {}, "last_eval_loss": math.nan}, "has no number eval_loss"),
        ({"num_trainable": None}, "has no number num_trainable"),
        ({"eval_metrics": {"accuracy": math.nan}}, "has no number accuracy"),
    ],
)
def test_results_that_lack_something_are_not_whole(
    tmp_path: Path, change: dict, sentence: str
) -> None:
    content = dict.fromkeys(COSTS, 1) | {"eval_metrics": {"accuracy": 0.5, "f1": 0.1}}
    path = tmp_path / "all_results.json"
    path.write_text(json.dumps(content))
    assert (read_training(tmp_path).metric, read_training(tmp_path).score) == ("accuracy", 0.5)
    path.write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=sentence):
        read_training(tmp_path)


def test_a_training_without_metrics_is_scored_by_its_held_out_loss(tmp_path: Path) -> None:
    content = dict.fromkeys(COSTS, 1) | {"first_eval_loss": 3.0, "last_eval_loss": 2.0}
    path = tmp_path / "all_results.json"
    path.write_text(json.dumps(content))
    assert (read_training(tmp_path).metric, read_training(tmp_path).score) == ("eval_loss", 2.0)
    path.write_text(json.dumps(content | {"eval_metrics": {"accuracy": 0.5}}))
    assert (read_training(tmp_path).metric, read_training(tmp_path).score) == ("accuracy", 0.5)


def test_verdicts_are_averaged_over_the_samples_of_a_problem(tmp_path: Path) -> None:
    evaluation = Evaluation(command=("x",), score="a.b-c.d", correct="ok", metric="em")
    comparison = comparison_in(tmp_path, a=Task(evaluate=evaluation))
    cell = cell_of("a", "gem", 1)
    folder = folder_of(comparison, cell) / "eval"
    folder.mkdir(parents=True)
    verdicts = [("p/1", True), ("p/1", False), ("p/0", 1), ("p/0", 1)]
    lines = [json.dumps({"task_id": name, "ok": ok}) for name, ok in verdicts]
    (folder / "verdicts.jsonl").write_text("\n".join(lines))
    found = read_predictions(comparison, cell)
    assert found.ids == ["p/1", "p/0"]
    assert found.correct.tolist() == [0.5, 1.0]
    (folder / "verdicts.jsonl").write_text(json.dumps({"task_id": "p/0", "ok": None}))
    with pytest.raises(ValueError, match="has no verdict ok of some samples"):
        read_predictions(comparison, cell)
    (folder / "verdicts.jsonl").write_text("\n".join(lines))
    content = dict.fromkeys(COSTS, 1) | {"eval_metrics": {"loss": 3.0}}
    (folder.parent / "all_results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"results\.json cannot be read"):
        read_result(comparison, cell)
    (folder / "results.json").write_text(json.dumps({"a": {"b-c": {"d": 0.75}}}))
    assert read_result(comparison, cell).score == 0.75
    (folder / "results.json").write_text(json.dumps({"a": {"b-c": {}}}))
    with pytest.raises(ValueError, match=r"has no number at a\.b-c\.d"):
        read_result(comparison, cell)
