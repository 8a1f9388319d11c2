"""The recipes: each is read without a complaint, and comparisons are fair."""

from pathlib import Path

import pytest
import yaml

from gem_ds.comparison.cells import search_cells, training_command
from gem_ds.comparison.grid import read_comparison
from gem_ds.train.arguments import parse_arguments

RECIPES = sorted((Path(__file__).resolve().parents[2] / "launch" / "recipes").glob("*.yaml"))
COMPARISONS = [path for path in RECIPES if path.stem.startswith("compare_")]

#: What makes a result and should be visible, besides what depends on the method.
VISIBLE = {
    *("model_name_or_path", "max_length", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "learning_rate", "seed"),
}


def hidden(flags: set[str], method: str) -> set[str]:
    """What should be visible of a run and is not among its flags."""
    wanted = set(VISIBLE)
    if method == "lora":
        wanted |= {"lora_r", "lora_alpha", "lora_dropout"}
    elif method in ("surgical", "auto_rgn"):  # whose targets are trained whole
        wanted |= {"target_modules"}
    elif method not in ("full", "bitfit", "ia3"):
        wanted |= {"density", "target_modules"}
    if not flags & {"num_train_epochs", "max_steps"}:
        wanted.add("num_train_epochs")
    return wanted - flags


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if path not in COMPARISONS], ids=lambda path: path.stem
)
def test_a_recipe_holds_flags_of_the_training_program(path):
    arguments = parse_arguments(["--config", str(path), "--output_dir", "runs/any"])
    flags = set(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert hidden(flags, arguments.method.method) == set()


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_a_comparison_is_fair_and_the_training_program_understands_it(path):
    comparison = read_comparison(path)
    assert comparison.output_dir == Path("runs") / path.stem
    assert len(comparison.seeds) == 3
    assert len({len(m.learning_rates) for m in comparison.methods.values()}) == 1, "equal tries"
    alike = {(c.task, c.method): c for c in search_cells(comparison)}  # but for the rate
    for cell in alike.values():
        command = training_command(comparison, cell)
        arguments = parse_arguments(command[command.index("launch/train.py") + 1 :])
        method = comparison.methods[cell.method].method
        assert arguments.method.method == method
        flags = {word.removeprefix("--") for word in command if word.startswith("--")}
        assert hidden(flags, method) == set()


def test_adapters_of_the_large_comparison_get_flags_that_they_take():
    # At ZeRO stage 3 shira is refused; ia3 without --target_modules scales what it was made for.
    comparison = read_comparison(RECIPES[0].with_name("compare_llama2_7b.yaml"))
    words = {c.method: training_command(comparison, c) for c in search_cells(comparison)}
    assert [method for method in words if "ds_configs/zero2.json" in words[method]] == ["shira"]
    assert {m for m in words if "--target_modules" not in words[m]} == {"ia3", "full"}
