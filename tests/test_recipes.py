"""The recipes: each is read without a complaint, and comparisons are fair."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.arguments import parse_arguments
from launch.comparison.cells import search_cells, training_command
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
    assert len({len(method.learning_rates) for method in comparison.methods.values()}) == 1


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_the_training_program_understands_every_command_of_a_comparison(path: Path) -> None:
    comparison = read_comparison(path)
    for cell in search_cells(comparison):
        command = training_command(comparison, cell)
        arguments = parse_arguments(command[command.index(comparison.program) + 1 :])
        assert arguments.method.method == cell.method


def test_adapters_of_the_large_comparison_get_flags_that_they_take() -> None:
    # At ZeRO stage 3 shira is refused; ia3 without --target_modules scales what it was made for.
    comparison = read_comparison(RECIPES[0].with_name("compare_llama2_7b.yaml"))
    commands = {
        cell.method: " ".join(training_command(comparison, cell))
        for cell in search_cells(comparison)
    }
    assert {method for method, text in commands.items() if "zero2.json" in text} == {"shira"}
    bare = {method for method, text in commands.items() if "--target_modules" not in text}
    assert bare == {"ia3", "full"}
