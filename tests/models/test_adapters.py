"""What peft writes of a new adapter is the same in each run."""

import json

import pytest

from gem_ds.models.adapters import add_adapter
from tests.tiny import make_model


@pytest.mark.parametrize("method", ["lora", "shira"])
def test_identical_runs_write_identical_configurations(tmp_path, method):
    """The library keeps names in a set, whose order depends on the process."""
    model = make_model("llama")
    targets = [n for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
    settings = {"seed": 0, "rank": 1, "lora_alpha": 4.0, "lora_dropout": 0.0}
    adapted = add_adapter(model, method, targets, [], **settings)
    adapted.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(written) == len(targets) == 14
    assert written == sorted(written)
