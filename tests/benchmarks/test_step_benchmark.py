"""The benchmark of a step: it runs as documented, and what it counts keeps its promises."""

import json
import subprocess
import sys

import pytest

from benchmarks.steps.shapes import SHAPES, adapter_size
from tests.tiny_model import REPOSITORY

pytestmark = pytest.mark.slow  # starts engines or programs

METHODS = ("gem", "full")


def test_gem_keeps_twelve_bytes_an_entry_and_sends_at_most_twenty(tmp_path):
    """Masters and two moments in fp32; the gradient, and the values for the write-back."""
    command = [sys.executable, "benchmarks/step.py", "--shape", "tiny", "--world_size", "2"]
    command += ["--stage", "3", "--tokens", "16", "--rounds", "2", "--steps", "1"]
    command += ["--contenders", *METHODS, "--density", "0.01", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "table.md").read_text()
    assert done.stdout.endswith(table)
    assert [line.split("|")[1].strip() for line in table.splitlines()[4:]] == list(METHODS)
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    for found in (numbers[method] for method in METHODS):
        assert len(found["seconds"]) == 2
        assert min(found["seconds"]) > 0
        assert found["peak_bytes"] > 0
        assert found["weights"] > 0  # at stage 3 all gather the frozen weights
    gem, full = numbers["gem"], numbers["full"]
    k = gem["num_trainable"]
    padding = 2 * 12  # one entry more on one rank
    assert 12 * k <= gem["state_bytes"] <= 12 * k + padding
    assert 4 * k <= gem["others"] <= 20 * k
    assert full["others"] >= 4 * full["num_trainable"]
    assert 12 * full["num_trainable"] <= full["state_bytes"]
    assert gem["checkpoint_bytes"] < 0.05 * full["checkpoint_bytes"]


def test_adapters_train_at_least_as_much_with_the_smallest_rank_that_does():
    config = SHAPES["tiny"](None)
    for density in (0.001, 0.01, 0.2):
        rank, reached = adapter_size(config, density)
        assert reached - reached / rank < density <= reached
