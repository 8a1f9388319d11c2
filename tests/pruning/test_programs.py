"""From a dense folder to a pruned one, to its delta by EBFT, to a folder that others load."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from gem_ds.cli import main
from gem_ds.files.delta import Delta
from gem_ds.pruning import prune_main
from tests.tiny_model import make_tiny

WORDS = "There are so many numbers, and each of them is one more than the one before it. "


def test_a_folder_is_pruned_and_mended_and_exported(tmp_path, capsys):
    dense = str(make_tiny(tmp_path).model)
    text, pruned, run, mended = (tmp_path / n for n in ("text", "pruned", "run", "mended"))
    text.write_text(WORDS * 20)
    rows = ["--text", str(text), "--max_length", "32", "--rows", "5", "--batch_size", "2"]
    flags = ["--model_name_or_path", dense, "--output_dir", str(pruned), "--sparsity", "2:4"]
    assert main(["prune", *flags, *rows]) == 0
    assert main(["prune", *flags]) == 1
    assert "is there already: name a new folder" in capsys.readouterr().err
    flags = ["--model_name_or_path", str(pruned), "--dense_model", dense, "--output_dir", str(run)]
    assert main(["ebft", *flags, *rows, "--epochs", "2"]) == 0
    assert "model.layers.1: mean squared error" in capsys.readouterr().out
    assert main(["ebft", *flags, *rows]) == 1
    assert "holds a delta: name another folder" in capsys.readouterr().err
    delta = Delta.load(run / "delta.safetensors")
    assert delta.mask.settings["batches"] == 3
    assert (
        main(["export", "--delta", str(run / "delta.safetensors"), "--output_dir", str(mended)])
        == 0
    )
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (dense, pruned, mended)]
    for name, weight in models[0].named_parameters():
        before, after = (model.get_parameter(name) for model in models[1:])
        assert torch.equal(before == 0, after == 0)
        if name in delta.mask.indices:
            groups = (before == 0).view(-1, 4).sum(dim=1)
            assert bool((groups == 2).all())
            assert torch.equal(before[before != 0], weight[before != 0])
            assert not torch.equal(before, after)
        else:
            assert torch.equal(after, weight)


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        ("prune", ["--sparsity", "4:2"], "The sparsity is 4:2: give a share"),
        ("prune", ["--sparsity", "0.5", "--rows", "8"], "cut --text: pass it too"),
        ("ebft", ["--dense_model", "none", "--text", "none", "--epochs", "0"], "at least 1"),
    ],
)
def test_flags_are_refused_before_anything_is_read(tmp_path, capsys, program, flags, message):
    folder = ["--model_name_or_path", "none", "--output_dir", str(tmp_path / "out")]
    assert main([program, *folder, *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_length", "1000"], "reads 128 tokens at most: lower --max_length"),
        (["--max_length", "100"], "holds 80 tokens, less than a row of 100: lower --max_length"),
        (["--max_length", "8", "--rows", "0"], "must be at least 1"),
    ],
)
def test_text_that_cannot_be_read_in_rows_is_refused_before_the_weights_load(
    tmp_path, capsys, monkeypatch, flags, message
):
    monkeypatch.delattr(prune_main, "load_weights")
    (tmp_path / "text").write_text(WORDS)
    paths = ["--output_dir", str(tmp_path / "out"), "--text", str(tmp_path / "text")]
    model = make_tiny(tmp_path / "tiny").model
    given = ["--model_name_or_path", str(model), "--sparsity", "0.5"]
    assert main(["prune", *given, *paths, *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
