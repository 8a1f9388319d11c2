"""Tables: rates, units, averages, losses, and what is said where something cannot be computed."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gem_ds.comparison.bootstrap import compare_methods
from gem_ds.comparison.cells import Cell, folder_of
from gem_ds.comparison.grid import Comparison, Evaluation, Method, Task
from gem_ds.comparison.markdown import Unit, byte_text, markdown
from gem_ds.comparison.results import COSTS, read_predictions, read_result
from gem_ds.comparison.table import (
    best_rate,
    cells_csv,
    finished,
    mean_and_std,
    table_csv,
    tabulate,
    tabulate_cells,
)
from tests.tiny_evaluation import refusal


def comparison_in(folder: Path, *, choose_by: Any = "score", **tasks: Task) -> Comparison:
    method = Method(learning_rates=(0.1,))
    return Comparison(
        output_dir=folder,
        methods={"full": method, "gem": method},
        tasks=tasks or {"a": Task()},
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


def save_answers(folder: Path, count: int) -> None:
    """Every other one is right."""
    rows = (
        {"id": i, "correct": i % 2, "prediction": "\u2028", "reference": 0} for i in range(count)
    )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "predictions.jsonl").write_text(text, encoding="utf-8")


def report(comparison: Comparison, cells: Iterable[Cell]) -> Any:
    """Text and tables of the runs that are there."""
    frame = tabulate_cells(comparison, cells)
    findings = {
        task: compare_methods(comparison, finished(frame, task, "test"))
        for task in comparison.tasks
    }
    rates = dict.fromkeys(zip(frame.task, frame.method, strict=True), 0.1)
    table = tabulate(comparison, frame, rates, findings)
    text = markdown(comparison, table, frame, findings, {cell_of("a", "full", 9): "a|b"})
    return SimpleNamespace(text=text, table=table, cells=frame, findings=findings)


def test_a_metric_is_written_in_its_unit():
    assert Unit("accuracy").write_spread(*mean_and_std([0.5, 0.52])) == "51.0 ± 1.4"
    assert Unit("accuracy").label == "accuracy (%)"
    assert Unit("matthews_correlation").write_spread(*mean_and_std([0.5])) == "0.500"
    assert [Unit(name).is_share for name in ("f1a", "pearson", "eval_loss")] == [True, False, False]
    assert Unit("eval_loss").write(1.23456, sign=True) == "+1.235"
    assert Unit("accuracy").write(-0.00001, sign=True) == "0.0"
    assert [byte_text(2.0**k) for k in (3, 14, 24, 33)] == ["8 B", "16 KiB", "16 MiB", "8.0 GiB"]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=6))
def test_the_best_rate_has_the_best_aim_then_the_least_loss_and_is_the_smallest(found):
    for name, sign in (("accuracy", -1), ("eval_loss", 1)):
        records = [(name, aim, loss, 10.0**k) for k, (aim, loss) in enumerate(found)]
        tried = pd.DataFrame(records, columns=["aim_name", "aim", "loss", "learning_rate"])
        order = sorted((sign * aim, loss, rate) for _, aim, loss, rate in records)
        assert best_rate(tried) == (order[0][-1] if order else None)


def test_an_edge_is_the_end_of_a_grid_of_several_rates():
    for rates, edges in (((1.0, 2.0, 3.0), {1.0, 3.0}), ((1.0,), set())):
        methods = {"gem": Method(learning_rates=rates)}
        comparison = replace(comparison_in(Path("out")), methods=methods)
        cells = tabulate_cells(comparison, [])
        for rate in rates:
            table = tabulate(comparison, cells, {("a", "gem"): rate}, {})
            assert table.is_at_edge[0] == (rate in edges)


def test_an_average_is_over_tasks_within_each_seed(tmp_path):
    comparison = comparison_in(tmp_path, a=Task(), b=Task())
    scores = {"gem": {"a": (0.2, 0.4), "b": (0.4, 0.8)}, "full": {"a": (0.5,), "b": (0.5, 0.5)}}
    cells = [cell_of(t, m, s) for m in scores for t in "ab" for s in (1, 2)]
    for metric in ("accuracy", "eval_loss"):
        for cell in cells:
            for score in scores[cell.method][cell.task][cell.seed - 1 : cell.seed]:
                save_run(comparison, cell, metric, score)
        # Seed by seed 0.3 and 0.6, a deviation of 0.3 / sqrt(2); one run of full is missing.
        lines = "| gem | 45.0 ± 21.2 | 100 % |\n| full | failed | 100 % |\n"
        assert (lines in report(comparison, cells).text) == (metric == "accuracy")
        alone = replace(comparison, tasks={"a": Task()})
        assert "Average" not in report(alone, [cell for cell in cells if cell.task == "a"]).text
    mean, std = mean_and_std([0.3, 0.6])
    assert (mean, std) == pytest.approx((0.45, 0.3 / math.sqrt(2)))
    assert math.isnan(mean_and_std([1.0])[1])


def test_differences_are_computed_or_it_says_why_not(tmp_path):
    comparison = comparison_in(tmp_path)
    cells = [cell_of("a", method, 1) for method in ("full", "gem")]

    def text_of(metric: str, score: float, *num_answers: int) -> str:
        for cell, count in zip(cells, num_answers or (0, 0), strict=True):
            folder = save_run(comparison, cell, metric, score)
            if count:
                save_answers(folder, count)
        made = report(comparison, cells)
        assert made.findings["a"].reference == "gem"  # wherever it stands
        return str(made.text.split("### Difference from gem\n\n")[1])

    no_loss = "Not computed: the bootstrap needs one metric, which is no loss."
    assert text_of("eval_loss", 2.0).startswith(no_loss)
    text = text_of("accuracy", 0.5)
    assert text.startswith("Not computed: ")
    assert "predictions.jsonl cannot be read" in text
    text = text_of("accuracy", 0.5, 4, 6)
    assert text.startswith("Not computed: the runs were not scored on the same examples.")
    other = "Of the share of right answers, which is not the metric above."
    for score, is_other in ((0.5, False), (0.6, True)):
        text = text_of("exact_match", score, 4, 4)
        assert "Intervals are not corrected for the number of comparisons." in text
        assert (other in text) == is_other
    assert "Difference from" not in report(comparison, cells[:1]).text


def test_losses_stand_beside_scores_where_rates_are_chosen_by_them(tmp_path):
    comparison = comparison_in(tmp_path, choose_by="loss")
    losses = {"full": (0.5, 0.7), "gem": (0.6, 0.9)}
    for method, own in losses.items():
        for seed, loss in enumerate(own, start=1):
            save_answers(save_run(comparison, cell_of("a", method, seed), "accuracy", 0.5, loss), 9)
    made = report(comparison, [cell_of("a", m, s) for m in losses for s in (1, 2)])
    assert set(zip(made.cells.aim_name, made.cells.aim, strict=True)) == {
        ("eval_loss", loss) for own in losses.values() for loss in own
    }
    # Student's quantile of one degree of freedom is 12.706; the differences are -0.1 and -0.2.
    reach = 12.7062 * 0.1 / math.sqrt(2) / math.sqrt(2)
    (name, found), *others = made.findings["a"].losses.items()
    assert (name, others) == ("full", [])
    expected = (-0.15, -0.15 - reach, -0.15 + reach)
    assert (found.value, found.low, found.high) == pytest.approx(expected, abs=1e-4)
    row = made.table.set_index("method").loc["full"]
    expected = (0.6, 0.1 * math.sqrt(2), 0.6 - 2 * reach, 0.6 + 2 * reach)
    found = (row.loss, row.loss_std, row.loss_low, row.loss_high)
    assert found == pytest.approx(expected, abs=1e-4)
    assert 0 <= row.low < row["mean"] < row.high <= 1
    assert ",mean,std,low,high,loss,loss_std,loss_low,loss_high,num_seeds," in table_csv(made.table)
    assert ",score,loss,num_trainable," in cells_csv(comparison, made.cells)
    for text in (
        "Of several learning rates each has the least loss,",
        "| accuracy (%) | 95 % interval | eval loss | 95 % interval | learning rate |",
        "| 0.600 ± 0.141 | -0.671 to 1.871 | 1e-01 |",
        "| method | difference of the loss | 95 % interval |  |",
        "| full | -0.150 | -0.785 to +0.485 |  |",
        "## Failed runs\n\n* a full at 1e-01, seed 9, test: a|b",  # a pipe in a log
    ):
        assert text in made.text


def test_results_that_lack_something_are_not_whole(tmp_path):
    comparison, cell = comparison_in(tmp_path), cell_of("a", "gem", 1)
    path = save_run(comparison, cell, "accuracy", 0.5) / "all_results.json"
    whole = json.loads(path.read_text())
    for change, sentence in (
        ({"eval_metrics": {}, "last_eval_loss": math.nan}, "has no number eval_loss"),
        ({"num_trainable": None}, "has no number num_trainable"),
        ({"eval_metrics": {"accuracy": math.nan}}, "has no number accuracy"),
        ({"last_eval_loss": math.nan}, "has no number last_eval_loss"),
    ):
        path.write_text(json.dumps(whole | change))
        assert sentence in refusal(read_result, replace(comparison, choose_by="loss"), cell)
    assert read_result(comparison, cell)["score"] == 0.5  # whose loss is not asked for
    path.write_text(json.dumps(whole | {"eval_metrics": {}}))
    result = read_result(comparison, cell)
    assert (result["metric"], result["score"]) == ("eval_loss", 1.0)
    del whole["last_eval_loss"]
    path.write_text(json.dumps(whole | {"eval_metrics": {"f1": 0.1, "accuracy": 0.5}}))
    result = read_result(comparison, cell)
    assert (result["metric"], result["score"]) == ("f1", 0.1)
    path.write_text(json.dumps(whole | {"eval_metrics": {}}))
    assert "has neither eval_metrics nor last_eval_loss" in refusal(read_result, comparison, cell)


def test_verdicts_are_averaged_over_the_samples_of_a_problem(tmp_path):
    evaluation = Evaluation(command=("x",), score="a.b-c.d", correct="ok")
    comparison = comparison_in(tmp_path, a=Task(evaluate=evaluation))
    cell = cell_of("a", "gem", 1)
    folder = save_run(comparison, cell, "loss", 3.0) / "eval"
    folder.mkdir()
    assert "results.json cannot be read" in refusal(read_result, comparison, cell)
    verdicts = [("p/1", True), ("p/1", False), ("p/0", 1), ("p/0", 1)]
    lines = [json.dumps({"task_id": name, "ok": ok}) for name, ok in verdicts]
    (folder / "verdicts.jsonl").write_text("\n".join(lines))
    found = read_predictions(comparison, cell)
    assert found.ids == ["p/1", "p/0"]
    assert found.correct.tolist() == [0.5, 1.0]
    (folder / "verdicts.jsonl").write_text(json.dumps({"task_id": "p/0", "ok": None}))
    assert "has no verdict ok of some samples" in refusal(read_predictions, comparison, cell)
    (folder / "results.json").write_text(json.dumps({"a": {"b-c": {"d": 0.75}}}))
    result = read_result(comparison, cell)
    assert (result["metric"], result["score"]) == ("a.b-c.d", 0.75)
    (folder / "results.json").write_text(json.dumps({"a": {"b-c": {}}}))
    assert "has no number at a.b-c.d" in refusal(read_result, comparison, cell)
