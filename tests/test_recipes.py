"""The recipes: each is read without a complaint, and comparisons are fair."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.arguments import parse_arguments
from launch.comparison.grid_file import read_comparison

RECIPES = sorted((Path(__file__).resolve().parents[1] / "launch" / "recipes").glob("*.yaml"))
COMPARISONS = [path for path in RECIPES if path.stem.startswith("compare_")]


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if path not in COMPARISONS], ids=lambda path: path.stem
)
def test_a_recipe_holds_flags_of_the_training_program(path: Path) -> None:
    arguments = parse_arguments(["--config", str(path), "--output_dir", "runs/any"])
    assert arguments.method.density is not None  # what makes a result should be visible


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_a_comparison_gives_every_method_as_many_tries(path: Path) -> None:
    comparison = read_comparison(path)
    assert comparison.output_dir == Path("runs") / path.stem
    assert len(comparison.seeds) == 3
    assert {len(method.learning_rates) for method in comparison.methods.values()} == {4}
