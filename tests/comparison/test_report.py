"""Tables: rates, units, averages, losses, and what is said where something cannot be computed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gem_ds.comparison.bootstrap import compare_methods
from gem_ds.comparison.cells import Cell, folder_of
from gem_ds.comparison.grid import Comparison, Evaluation, Method, Task
from gem_ds.comparison.markdown import byte_text, markdown
from gem_ds.comparison.metrics import Unit
from gem_ds.comparison.results import COSTS, read_predictions, read_result, read_training
from gem_ds.comparison.table import (
    averages,
    best_rate,
    cells_csv,
    finished,
    mean_and_std,
    table_csv,
    tabulate,
    tabulate_cells,
)

#: What a run of each method and task scored, by seed; None of one that failed.
Scores = dict[tuple[str, str], dict[int, float | None]]


def comparison_in(folder: Path, *, choose_by: Any = "score", **tasks: Task) -> Comparison:
    method = Method(learning_rates=(0.1,))
    return Comparison(
        output_dir=folder,
        methods={"full": method, "gem": method},
        tasks=tasks,
        seeds=(1, 2),
        dev_examples=5,
        choose_by=choose_by,
    )


def cell_of(task: str, method: str, seed: int) -> Cell:
    return Cell(task=task, method=method, learning_rate=0.1, seed=seed, split="test")


def save_run(
    comparison: Comparison, cell: Cell, metric: str, score: float, loss: float = 1.0
) -> Path:
    folder = folder_of(comparison, cell)
    folder.mkdir(parents=True, exist_ok=True)
    content = dict.fromkeys(COSTS, 1) | {"eval_metrics": {metric: score}, "last_eval_loss": loss}
    (folder / "all_results.json").write_text(json.dumps(content))
    return folder


def save_answers(folder: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "predictions.jsonl").write_text(text, encoding="utf-8")


def report(comparison: Comparison, scores: Scores, metric: str = "accuracy") -> tuple[str, Any]:
    """table.md and the tables behind it, of runs with these scores."""
    cells = []
    for (task, method), by_seed in scores.items():
        for seed, score in by_seed.items():
            cells.append(cell_of(task, method, seed))
            if score is not None:
                save_run(comparison, cells[-1], metric, score)
    frame = tabulate_cells(comparison, cells)
    findings = {
        task: compare_methods(comparison, finished(frame, task, "test"))
        for task in comparison.tasks
    }
    table = tabulate(comparison, frame, dict.fromkeys(scores, 0.1), findings)
    return markdown(comparison, table, frame, findings, {}), (table, frame, findings)


def test_a_metric_is_written_in_its_unit() -> None:
    assert Unit("accuracy").write_spread(*mean_and_std([0.5, 0.52])) == "51.0 ± 1.4"
    assert Unit("accuracy").label == "accuracy (%)"
    assert Unit("matthews_correlation").write_spread(*mean_and_std([0.5])) == "0.500"
    assert [Unit(name).is_share for name in ("f1a", "pearson", "eval_loss")] == [True, False, False]
    assert Unit("eval_loss").write(1.23456, sign=True) == "+1.235"
    assert Unit("accuracy").write(-0.00001, sign=True) == "0.0"
    assert [byte_text(2.0**k) for k in (3, 14, 24, 33)] == ["8 B", "16 KiB", "16 MiB", "8.0 GiB"]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=6))
def test_the_best_rate_has_the_best_score_then_the_least_loss_and_is_the_smallest(
    found: list[tuple[int, int]],
) -> None:
    for metric, choose_by, sign in (
        ("accuracy", "score", -1),
        ("eval_loss", "score", 1),
        ("accuracy", "loss", 0),  # whatever the score is
    ):
        records = [(metric, score, loss, 10.0**k) for k, (score, loss) in enumerate(found)]
        tried = pd.DataFrame(records, columns=["metric", "score", "loss", "learning_rate"])
        order = sorted((sign * score, loss, rate) for _, score, loss, rate in records)
        expected = order[0][-1] if order else None
        assert best_rate(comparison_in(Path("out"), choose_by=choose_by), tried) == expected


def test_an_edge_is_the_end_of_a_grid_of_several_rates(tmp_path: Path) -> None:
    def is_at_edge(rate: float, *rates: float) -> bool:
        comparison = replace(
            comparison_in(tmp_path, a=Task()), methods={"gem": Method(learning_rates=rates)}
        )
        cells = tabulate_cells(comparison, [])
        return tabulate(comparison, cells, {("a", "gem"): rate}, {}).is_at_edge[0]

    assert is_at_edge(1, 1, 2, 3)
    assert is_at_edge(3, 1, 2, 3)
    assert not is_at_edge(2, 1, 2, 3)
    assert not is_at_edge(1, 1)


def test_an_average_is_over_tasks_within_each_seed(tmp_path: Path) -> None:
    scores: Scores = {
        ("a", "gem"): {1: 0.2, 2: 0.4},
        ("a", "full"): {1: 0.5, 2: None},
        ("b", "gem"): {1: 0.4, 2: 0.8},
        ("b", "full"): {1: 0.5, 2: 0.5},
    }
    _, (table, cells, _) = report(comparison_in(tmp_path, a=Task(), b=Task()), scores)
    found = averages(table, cells)
    assert found["gem"] == pytest.approx([0.3, 0.6])
    assert found["full"] == []  # one of its runs is missing
    assert averages(table[table.task == "a"], cells) == {}
    assert averages(table.assign(metric="eval_loss"), cells) == {}
    mean, std = mean_and_std([0.3, 0.6])
    assert (mean, std) == pytest.approx((0.45, 0.3 / math.sqrt(2)))
    assert math.isnan(mean_and_std([1.0])[1])


def test_differences_that_cannot_be_computed_say_why(tmp_path: Path) -> None:
    both: Scores = {("a", "full"): {1: 2.0}, ("a", "gem"): {1: 2.0}}
    text, _ = report(comparison_in(tmp_path / "loss", a=Task()), both, "eval_loss")
    note = "Not computed: the bootstrap needs one metric, which is no loss."
    assert f"### Difference from gem\n\n{note}" in text
    text, _ = report(comparison_in(tmp_path / "both", a=Task()), both)
    assert "### Difference from gem\n\nNot computed: " in text
    assert "predictions.jsonl cannot be read" in text
    text, _ = report(comparison_in(tmp_path / "one", a=Task()), {("a", "gem"): {1: 0.5}})
    assert "Difference from" not in text


def test_a_bootstrap_of_another_quantity_than_the_metric_says_so(tmp_path: Path) -> None:
    comparison = comparison_in(tmp_path, a=Task())
    answers = [
        {"id": i, "correct": i % 2, "prediction": "\u2028", "reference": 0} for i in range(4)
    ]
    for method in ("full", "gem"):
        save_answers(save_run(comparison, cell_of("a", method, 1), "x", 0), answers)
    for score, note in ((0.5, ""), (0.6, "Of the share of right answers, which is not the metric")):
        scores: Scores = {("a", method): {1: score} for method in ("full", "gem")}
        text, (_, _, findings) = report(comparison, scores, "exact_match")
        assert findings["a"].reference == "gem"  # wherever it stands
        assert findings["a"].note[: len(note) or None] == note
        assert "Intervals are not corrected for the number of comparisons." in text


def test_losses_stand_beside_scores_where_rates_are_chosen_by_them(tmp_path: Path) -> None:
    comparison = comparison_in(tmp_path, choose_by="loss", a=Task())
    losses = {"full": (0.5, 0.7), "gem": (0.6, 0.9)}
    for method, own in losses.items():
        for seed, loss in enumerate(own, start=1):
            folder = save_run(comparison, cell_of("a", method, seed), "accuracy", 0.5, loss)
            rows = [{"id": i, "correct": i % 2, "prediction": 0, "reference": 0} for i in range(9)]
            save_answers(folder, rows)
    cells = tabulate_cells(comparison, [cell_of("a", m, s) for m in losses for s in (1, 2)])
    findings = {"a": compare_methods(comparison, finished(cells, "a", "test"))}
    table = tabulate(comparison, cells, {("a", m): 0.1 for m in losses}, findings)
    # Student's quantile of one degree of freedom is 12.706; the differences are -0.1 and -0.2.
    reach = 12.7062 * 0.1 / math.sqrt(2) / math.sqrt(2)
    found = findings["a"].losses["full"]
    assert (found.value, found.low, found.high) == pytest.approx(
        (-0.15, -0.15 - reach, -0.15 + reach), abs=1e-4
    )
    assert list(findings["a"].losses) == ["full"]
    row = table.set_index("method").loc["full"]
    assert (row.loss, row.loss_std) == pytest.approx((0.6, 0.1 * math.sqrt(2)))
    assert (row.loss_low, row.loss_high) == pytest.approx(
        (0.6 - 2 * reach, 0.6 + 2 * reach), abs=1e-4
    )
    assert 0 <= row.low < row["mean"] < row.high <= 1
    assert ",mean,std,low,high,loss,loss_std,loss_low,loss_high,num_seeds," in table_csv(table)
    assert ",score,loss,num_trainable," in cells_csv(comparison, cells)
    text = markdown(comparison, table, cells, findings, {})
    assert "Of several learning rates each has the least loss," in text
    assert "| accuracy (%) | 95 % interval | eval loss | 95 % interval | learning rate |" in text
    assert "| 0.600 ± 0.141 | -0.671 to 1.871 | 1e-01 |" in text
    assert "| method | difference of the loss | 95 % interval |  |" in text
    assert "| full | -0.150 | -0.785 to +0.485 |  |" in text


def test_a_run_without_the_loss_that_rates_are_chosen_by_is_not_whole(tmp_path: Path) -> None:
    comparison, cell = comparison_in(tmp_path, a=Task()), cell_of("a", "gem", 1)
    save_run(comparison, cell, "accuracy", 0.5, math.nan)
    assert read_result(comparison, cell).score == 0.5
    with pytest.raises(ValueError, match="has no number last_eval_loss"):
        read_result(replace(comparison, choose_by="loss"), cell)
    _, frames = report(comparison, {("a", "gem"): {1: 0.5, 2: 0.5}})
    text = markdown(comparison, *frames, {cell_of("a", "full", 1): "a|b"})
    assert "## Failed runs\n\n* a full at 1e-01, seed 1, test: a|b" in text  # a pipe in a log


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

    def read(change: dict) -> tuple[str, float]:
        (tmp_path / "all_results.json").write_text(json.dumps(content | change))
        found = read_training(tmp_path)
        return found.metric, found.score

    losses = {"first_eval_loss": 3.0, "last_eval_loss": 2.0}
    assert read({}) == read(losses) == ("accuracy", 0.5)
    assert read(losses | {"eval_metrics": {}}) == ("eval_loss", 2.0)
    with pytest.raises(ValueError, match=sentence):
        read(change)


def test_verdicts_are_averaged_over_the_samples_of_a_problem(tmp_path: Path) -> None:
    evaluation = Evaluation(command=("x",), score="a.b-c.d", correct="ok")
    comparison = comparison_in(tmp_path, a=Task(evaluate=evaluation))
    cell = cell_of("a", "gem", 1)
    folder = save_run(comparison, cell, "loss", 3.0) / "eval"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"results\.json cannot be read"):
        read_result(comparison, cell)
    verdicts = [("p/1", True), ("p/1", False), ("p/0", 1), ("p/0", 1)]
    lines = [json.dumps({"task_id": name, "ok": ok}) for name, ok in verdicts]
    (folder / "verdicts.jsonl").write_text("\n".join(lines))
    found = read_predictions(comparison, cell)
    assert found.ids == ["p/1", "p/0"]
    assert found.correct.tolist() == [0.5, 1.0]
    (folder / "verdicts.jsonl").write_text(json.dumps({"task_id": "p/0", "ok": None}))
    with pytest.raises(ValueError, match="has no verdict ok of some samples"):
        read_predictions(comparison, cell)
    (folder / "results.json").write_text(json.dumps({"a": {"b-c": {"d": 0.75}}}))
    result = read_result(comparison, cell)
    assert (result.metric, result.score) == ("a.b-c.d", 0.75)
    (folder / "results.json").write_text(json.dumps({"a": {"b-c": {}}}))
    with pytest.raises(ValueError, match=r"has no number at a\.b-c\.d"):
        read_result(comparison, cell)
