"""What is told of a comparison's runs: tables against numbers that were put into the files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.deltas import make_delta
from tests.tiny import tiny_config
from tests.tiny_model import REPOSITORY

Q, V = (f"model.layers.{i}.self_attn.{m}_proj.weight" for i, m in ((0, "q"), (1, "v")))
FACTORS = "adapter_model.safetensors"
COSTS = ("num_trainable", "num_parameters", "peak_memory_bytes", "seconds_per_step")


@pytest.fixture
def analyse(monkeypatch):
    """The program, which finds what lies beside it as a script does."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import analyse

    return analyse


def finish(folder: Path, loss: float, score: float = 0.5) -> Path:
    folder.mkdir(parents=True)
    costs = dict.fromkeys((*COSTS, "calibration_seconds", "optimizer_state_bytes"), 1)
    results = costs | {"last_eval_loss": loss, "eval_metrics": {"accuracy": score}}
    (folder / "all_results.json").write_text(json.dumps(results))
    return folder


def rows_of(text: str, title: str) -> dict[str, list[str]]:
    """The lines of the first table below a title, by their first cell."""
    table = text.partition(f"## {title}")[2].split("\n\n")[1]
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in cells[2:]}


@pytest.fixture
def comparison(tmp_path) -> Path:
    """Doubled, negated and other weights, on a model of two layers."""
    model, root = LlamaForCausalLM(tiny_config("trained")), tmp_path / "runs"
    model.save_pretrained(tmp_path / "base")
    chosen = {
        ("gem", 1): ({Q: [0, 1, 2], V: [5]}, 2.0),
        ("gem", 2): ({Q: [0, 1, 3], V: [5]}, 2.0),
        ("random", 1): ({Q: [2, 7], V: [5, 6]}, -1.0),
    }
    for (method, seed), (indices, factor) in chosen.items():
        folder = finish(root / "rte" / method / "test" / f"lr1e-02_seed{seed}", 0.5)
        delta = make_delta(model, indices, str(tmp_path / "base"))
        weights = {name: model.get_parameter(name).detach().flatten() for name in indices}
        delta.values.update({name: factor * weights[name][i] for name, i in indices.items()})
        delta.save(folder / "delta.safetensors")
        delta.mask.save(folder / "mask.safetensors")
    for rate, loss in (("1e-03", 0.7), ("1e-02", 0.25), ("1.5e-01", 3.0)):
        finish(root / "rte" / "gem" / "dev" / f"lr{rate}_seed1", loss, 1 - loss / 4)
    (root / "rte" / "lora" / "dev" / "lr1e-03_seed1").mkdir(parents=True)  # still at work
    damaged = finish(root / "rte" / "full" / "dev" / "lr1e-03_seed1", 1.0) / "all_results.json"
    damaged.write_text(damaged.read_text()[:20])

    adapter = finish(root / "rte" / "lora" / "test" / "lr1e-03_seed1", 0.4) / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    a, b = torch.randn(2, model.config.hidden_size), torch.randn(model.config.hidden_size, 2)
    key = f"base_model.model.{Q.removesuffix('.weight')}"
    factors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    save_file(factors, adapter / FACTORS)

    tuned = LlamaForCausalLM(model.config)
    tuned.load_state_dict({name: 1.5 * weight for name, weight in model.state_dict().items()})
    tuned.save_pretrained(finish(root / "rte" / "full" / "test" / "lr1e-05_seed1", 0.4) / "model")
    return root


def test_the_tables_say_what_the_files_hold(tmp_path, comparison, analyse):
    analyse.main([str(comparison), "--output_dir", str(tmp_path / "out")])
    text = (tmp_path / "out" / "analysis.md").read_text()

    rates = rows_of(text, "Development loss")
    assert rates == {"gem": ["0.700 (0.825)", "**0.250 (0.938)**", "3.000 (0.250)"]}

    budgets = rows_of(text, "Where the budget went: rte")
    spread = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert budgets["gem"] == [f"{spread:.1f} of 2", "75.0%", "75%", "25%", "75%, 25%, 0%"]
    assert budgets["random"][2:4] == ["50%", "50%"]

    moved = rows_of(text, "How far entries moved: rte")
    assert [*moved] == ["gem", "random", "full", "lora"]
    assert [moved[m][2] for m in ("gem", "random", "full")] == [
        "1, 1, 1",
        "2, 2, 2",
        "0.5, 0.5, 0.5",
    ]
    assert [moved[m][-1] for m in ("gem", "random", "full")] == ["0.0%", "100.0%", "0.0%"]
    assert {row[0] for row in moved.values()} == {"100.0%"}

    # Of seeds 1 and 2 gem's masks have 3 of 4 entries in common, with random's at seed 1 two.
    agree = rows_of(text, "How far masks agree")
    assert agree["gem"][:2] == ["0.750", "1.000"]
    assert agree["random"][:2] == ["", ""]
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        *("rates.png", "budgets.png", "overlap.png", "movement.png"),
    }


def test_a_movement_is_measured_in_the_units_of_its_matrix(comparison, analyse):
    import analysis.movement as movement
    from analysis.overlap import overlap_matrix
    from analysis.runs import finished_runs

    runs = {run.method: run for run in finished_runs(comparison) if run.split == "test"}
    base = movement.parameters_of(comparison.parent / "base")
    weight = base[Q].double().numpy()
    adapter = runs["lora"].folder / "adapter"
    ((name, product),) = movement._products(adapter)
    a, b = (factor.double().numpy() for _, factor in sorted(load_file(adapter / FACTORS).items()))
    expected = 4 * b @ a
    assert name == Q
    np.testing.assert_allclose(product.numpy(), expected, rtol=1e-5, atol=1e-5)
    found = movement.movement_of([runs["lora"]], base, [])
    rms = np.sqrt((weight**2).mean())
    np.testing.assert_allclose(found.change, expected.ravel()[::17] / rms, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.weight, weight.ravel()[::17] / rms)
    still = movement.Movement(weight=np.array([0.0, 0.0, 2.0]), change=np.array([0.0, 1.0, -3.0]))
    assert still.relative.tolist() == [0.0, np.inf, 1.5]
    assert still.is_turned.tolist() == [False, False, True]
    masks = analyse._masks([run for run in finished_runs(comparison) if run.split == "test"])
    np.testing.assert_allclose(overlap_matrix(masks), [[0.75, 0.5], [0.5, np.nan]])


def test_a_folder_without_runs_is_refused(tmp_path, analyse):
    with pytest.raises(ValueError, match="holds no finished run"):
        analyse.main([str(tmp_path), "--output_dir", str(tmp_path / "out")])
