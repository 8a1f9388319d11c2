"""Comparisons whose answers are generated: chosen by the held-out loss, scored by a second command.

The real programs run once, on the embedded model; else a stand-in trains.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from gem_ds.comparison import main as compare

pytestmark = pytest.mark.slow  # starts engines or programs

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "launch" / "recipes" / "compare_demo.yaml"


def compare_in(folder: Path, content: dict) -> int:
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(content | {"output_dir": str(folder / "out")}, sort_keys=False))
    return compare.main(["--config", str(path)])


def test_the_rate_with_the_least_held_out_loss_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls.txt"))
    rates = {"gem": ["1e-3", "1e-2", "1e-1"], "full": ["1e-4", "1e-3", "1e-2"]}
    content = {
        "program": str(Path(__file__).with_name("fake_train.py")),
        "seeds": [42],
        "dev_examples": 7,
        "methods": {name: {"learning_rates": own} for name, own in rates.items()},
        "tasks": {"gsm8k": None},
    }
    assert compare_in(tmp_path, content) == 0
    text = (tmp_path / "out/table.md").read_text()
    assert "### Learning rates: eval loss on the development split" in text
    assert "| gem | 1e-03: 0.200 | **1e-02: 0.100** | 1e-01: 0.200 |" in text
    assert "| gem | 0.200 | 1e-02 |" in text
    assert "| full | 0.200 | 1e-03 |" in text


def test_the_real_programs_fill_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    content = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    content["seeds"] = [42]
    content["methods"] = {"gem": {"learning_rates": ["1e-2"]}}
    content["choose_by"] = "loss"
    content["common"] |= {"max_steps": 2, "calibration_examples": 8, "train_examples": 64}
    content["tasks"]["gsm8k"]["evaluate"]["command"] += " --limit 8"
    assert compare_in(tmp_path, content) == 0, (tmp_path / "out/table.md").read_text()
    text = (tmp_path / "out/table.md").read_text()
    assert "| method | strict-match (%) | 95 % interval | eval loss |" in text
    scores = r"\d+\.\d \| \d+\.\d to \d+\.\d \| \d\.\d{3} \|  "  # one seed: none of the loss
    trained = r"1e-02 \| [\d,]+ \| [\d.]+ %"
    costs = r"\d+ [KM]iB \| [\d.]+ [MG]iB \| [\d.]+ \| [\d.]+"
    assert re.search(rf"^\| gem \| {scores}\| {trained} \| {costs} \|$", text, re.MULTILINE), text
