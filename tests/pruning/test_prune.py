"""Pruning against naive loops: which weights become 0, and that nothing else changes."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
)

import gem_ds
from gem_ds.models.targets import find_targets
from gem_ds.pruning import prune
from gem_ds.pruning.block_by_block import NoChainError
from tests.tiny import bits, make_model, model_of, tiny_config

#: Where the rows of all matrices can be cut into fours.
SIZES = {
    "llama": {"hidden_size": 20, "intermediate_size": 12, "head_dim": 4},
    "gpt2": {"hidden_size": 12},
}


def _model(architecture: str) -> Any:
    return model_of(tiny_config(architecture, **SIZES[architecture])).eval()


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 7), (1, 5))
    return [{"input_ids": torch.randint(1, 40, s, generator=generator)} for s in shapes]


def _pruned_rows(rows: list[list[float]], sparsity: float | str) -> list[list[bool]]:
    """Which entries of each row are the lowest, by sorting in plain Python."""
    result = []
    for row in rows:
        size = 4 if sparsity == "2:4" else len(row)
        count = 2 if sparsity == "2:4" else int(sparsity * size)  # type: ignore[operator]
        flags: list[bool] = []
        for start in range(0, len(row), size):
            part = row[start : start + size]
            lowest = sorted(range(len(part)), key=lambda i: (part[i], i))[:count]
            flags += [i in lowest for i in range(len(part))]
        result.append(flags)
    return result


def _as_rows(module: nn.Module) -> Tensor:
    weight = module.get_parameter("weight").detach()
    return weight.t() if type(module).__name__ == "Conv1D" else weight


def _inputs(model: Any, module: nn.Module) -> Tensor:
    """What a layer reads over all batches, [tokens, inputs]."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
@pytest.mark.parametrize("is_wanda", [False, True], ids=["magnitude", "wanda"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "llama without a chain"])
def test_the_lowest_become_0_and_nothing_else_changes(
    architecture, is_wanda, sparsity, monkeypatch
):
    """Of each block by the inputs that the pruned blocks before it give."""
    if " " in architecture:
        architecture, *_ = architecture.split()
        monkeypatch.setattr(prune, "BlockByBlock", mock.Mock(side_effect=NoChainError))
    expected = _model(architecture)
    targets = find_targets(expected, ["all-linear"])
    for block in (".0.", ".1."):
        layers = [module for name, module in targets.items() if block in name]
        if is_wanda:
            norms = [_inputs(expected, layer).norm(dim=0) for layer in layers]
        for i, layer in enumerate(layers):
            rows = _as_rows(layer)
            scores = rows.abs() * norms[i] if is_wanda else rows.abs()
            if not is_wanda and sparsity != "2:4":
                scores = scores.reshape(1, -1)
            zeros = torch.tensor(_pruned_rows(scores.tolist(), sparsity)).view(rows.shape)
            rows[zeros] = 0.0
    model = _model(architecture).train()
    gem_ds.prune(model, sparsity, batches() if is_wanda else None)
    assert model.training
    shares = []
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(bits(found.detach()), bits(wanted.detach())), name
        shares += [(found == 0).double().mean().item()] * (name in targets)
    assert shares == pytest.approx([0.5] * len(targets), abs=0.03)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_pruned_model_keeps_its_zeros_where_entries_are_selected():
    model = _model("llama")
    gem_ds.prune(model, "2:4")
    mask = gem_ds.select_mask(model, rule="magnitude", density="0.05")
    assert mask.settings["keep_zeros"]
    for name, index in mask.indices.items():
        assert bool(model.get_parameter(name).detach().flatten()[index.long()].all())


def test_experts_that_are_one_parameter_are_nothing_to_prune():
    with pytest.raises(ValueError, match="--target_modules experts names nothing that can be"):
        gem_ds.prune(make_model("mixtral"), 0.5, target_modules="experts")


def test_blocks_that_give_pairs_are_pruned_by_passes_of_the_whole_model():
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DebertaV2Config(vocab_size=40, intermediate_size=16, type_vocab_size=0, **sizes)
    model = AutoModelForSequenceClassification.from_config(config)
    dense = copy.deepcopy(model)
    gem_ds.prune(model, 0.5, batches())
    for name in find_targets(model, ["all-linear"]):
        if ".layer." in name:
            assert (model.get_parameter(name) == 0).double().mean() == 0.5, name
    with pytest.raises(NoChainError, match="are no chain"):
        gem_ds.fit_blocks(model, dense, batches())


@pytest.mark.parametrize(
    ("sparsity", "batches", "message"),
    [
        (0.0, None, "The sparsity is 0.0: give a share of zeros above 0 and below 1, or n:m"),
        (1, None, "The sparsity is 1: give a share"),
        ("4:2", None, "The sparsity is 4:2: give a share"),
        ("0:4", None, "The sparsity is 0:4: give a share"),
        ("half", None, "The sparsity is half: give a share"),
        ("2:7", None, "cannot share out: leave it out of target_modules"),
        (0.5, [], "no batches: pass at least one, or None to go by magnitude"),
    ],
)
def test_what_is_refused_changes_nothing(sparsity, batches, message):
    model, before = make_model("llama"), make_model("llama")
    with pytest.raises(ValueError, match=message):
        gem_ds.prune(model, sparsity, batches)
    for found, wanted in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(found, wanted)
