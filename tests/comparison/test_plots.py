"""Pictures: nothing overlaps or is cut off, whatever takes part."""

import itertools
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gem_ds.comparison.budget_plot import budget_figure, place_of, short_names
from gem_ds.comparison.grid import Comparison, Method, Task
from gem_ds.comparison.plots import (
    STYLES,
    rate_figure,
    score_figure,
    side_by_side,
)
from gem_ds.comparison.results import COSTS
from gem_ds.comparison.table import tabulate
from gem_ds.train.methods import METHODS
from tests.deltas import mask_of


def comparison_of(num_tasks: int) -> tuple[Comparison, pd.DataFrame, pd.DataFrame]:
    """All methods on so many tasks, with scores that lie close together: its tables."""
    rates = (0.002, 0.003, 0.004)  # within one decade
    comparison = Comparison(
        output_dir=Path("out"),
        methods={method: Method(learning_rates=rates) for method in METHODS},
        tasks={f"task{i}": Task() for i in range(num_tasks)},
        seeds=(1, 2),
        dev_examples=5,
    )
    runs = [(0.003, seed, "test", seed / 100) for seed in comparison.seeds]
    runs += [(rate, 1, "dev", rate) for rate in rates[:2]]
    records = [
        (task, method, rate, seed, split, 0.5 + place / 100 + more)
        for task, (place, method), (rate, seed, split, more) in itertools.product(
            comparison.tasks, enumerate(METHODS), runs
        )
    ]
    columns = ["task", "method", "learning_rate", "seed", "split", "score"]
    metric = "matthews_correlation"
    cells = pd.DataFrame(records, columns=columns).assign(metric=metric, aim_name=metric, loss=1.0)
    cells = cells.assign(aim=cells.score, **dict.fromkeys(COSTS, 25_000.0))
    chosen = dict.fromkeys(itertools.product(comparison.tasks, METHODS), 0.003)
    return comparison, tabulate(comparison, cells, chosen, {}), cells


def assert_tidy(figure: Figure) -> None:
    """Tick labels of an axis do not overlap, and nothing leaves the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    box, (width, height) = figure.get_tightbbox(renderer), figure.get_size_inches()
    assert min(box.x0, box.y0) > -0.02
    assert box.x1 < width + 0.02
    assert box.y1 < height + 0.02
    for axes in figure.axes:
        labels = [label for label in axes.get_yticklabels() if label.get_text()]
        boxes = [label.get_window_extent(renderer) for label in labels]
        for below, above in itertools.pairwise(sorted(boxes, key=lambda box: box.y0)):
            assert above.y0 >= below.y1 - 1
        if axes.get_xscale() == "log":
            low, high = axes.get_xlim()
            assert any(low <= tick <= high for tick in axes.get_xticks())  # a number to read


@pytest.mark.parametrize("num_tasks", [1, 8])
def test_all_methods_on_several_tasks_are_readable(num_tasks):
    comparison, table, cells = comparison_of(num_tasks)
    assert_tidy(score_figure(table))
    assert_tidy(rate_figure(comparison, table, cells))


@pytest.mark.parametrize("losses", [(0.007, 0.06, 2.1), (0.68, 0.69, 0.7), (0.007, 1.0, 1e6)])
def test_losses_are_told_apart_beside_one_that_is_far_off(losses):
    comparison, table, _ = comparison_of(1)
    rates = comparison.methods["gem"].learning_rates
    tried = pd.DataFrame({"learning_rate": rates, "aim": losses, "score": losses})
    cells = pd.concat([tried.assign(task="task0", method=name, split="dev") for name in METHODS])
    table = table.assign(dev_metric="eval_loss", dev_score=losses[1])
    figure = rate_figure(comparison, table, cells)
    assert_tidy(figure)
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    places = [axes.transLimits.transform(axes.transScale.transform((1, y)))[1] for y in losses]
    assert min(b - a for a, b in itertools.pairwise(places)) > 0.1
    assert any(low <= tick <= high for tick in axes.get_yticks())


@pytest.mark.parametrize(("num_layers", "num_methods"), [(1, 1), (48, 7)])
def test_budgets_of_small_and_large_models_are_readable(num_layers, num_methods):
    modules = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    names = [f"model.layers.{i}.{m}.weight" for i in range(num_layers) for m in modules]
    figure = budget_figure("rte", {m: mask_of(names) for m in list(METHODS)[:num_methods]})
    assert_tidy(figure)
    image = figure.axes[0].images[0].get_array()
    assert image is not None
    assert image.shape == (num_layers, 3)
    assert image.sum() == pytest.approx(100)
    assert image[0, 0] == pytest.approx(100 / sum(range(1, len(names) + 1)))


def test_every_method_has_a_look_of_its_own():
    assert STYLES.keys() >= set(METHODS)
    rows = [STYLES[name] for name in ("gem_sam", "gem_wide", "gem_sam")]
    assert rows[0] == rows[2] != rows[1]
    assert len(set(STYLES.values())) == len(STYLES)
    assert len({marker for _, marker in STYLES.values()}) == len(STYLES)


@given(st.lists(st.sampled_from([10, 1_000, 1_001, 50_000, 10**9]), min_size=1, max_size=12))
def test_methods_of_equal_budget_stand_side_by_side(counts):
    places = side_by_side(counts)
    assert len(set(places)) == len(places)
    for place, count in zip(places, counts, strict=True):
        assert 0.3 < place / count < 3
        assert counts.count(count) > 1 or count in (1_000, 1_001) or place == count


def test_weights_are_placed_by_their_names():
    names = {
        "bert.encoder.layer.3.attention.self.query.weight": (3, "attention.self.query"),
        "model.decoder.layers.11.fc1.weight": (11, "fc1"),
        "pooler.dense.weight": (-1, "pooler.dense"),
    }
    assert {name: place_of(name) for name in names} == names
    long = ["attention.self.query", "attention.output.dense", "output.dense"]
    assert short_names(long) == ["query", *long[1:]]
