"""EBFT against a naive dense loop; what may change, and what is on the device, at any time."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import gem_ds
from gem_ds.models.targets import find_targets
from gem_ds.pruning.block_by_block import BlockByBlock
from tests.pruning.test_prune import batches
from tests.tiny import bits, make_model, model_of, tiny_config

BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "falcon": "transformer.h"}
RATE, EPOCHS = 0.01, 3


def _dense(architecture: str) -> Any:
    if architecture == "falcon":  # whose blocks give tuples
        sizes = {"num_kv_heads": 1, "alibi": False, "ffn_hidden_size": 10}
        return model_of(tiny_config("gpt2", model_type="falcon", hidden_size=12, **sizes))
    return make_model(architecture, dropout=0.0)


def _pruned(architecture: str) -> tuple[Any, Any]:
    """A pruned model and the dense one."""
    dense = _dense(architecture)
    model = copy.deepcopy(dense)
    gem_ds.prune(model, 0.5)
    return model, dense


def _states_after(model: Any, block: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What a block gives while the whole model reads a batch."""
    seen: list[Tensor] = []
    handle = block.register_forward_hook(
        lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(**batch)
    handle.remove()
    return seen[0]


def _fit_naively(model: Any, dense: Any, blocks: str) -> list[tuple[float, float]]:
    """Through the whole models, with dense gradients; what is pruned is put back to 0 each step."""
    targets, errors = find_targets(model, ["all-linear"]), []
    for number, block in enumerate(model.get_submodule(blocks)):
        weights = [model.get_parameter(n) for n in targets if n.startswith(f"{blocks}.{number}.")]
        zeros = [weight.detach() == 0 for weight in weights]
        optimizer = torch.optim.Adam(weights)
        losses = []
        num_steps = EPOCHS * len(batches())
        for step, batch in enumerate(batches() * EPOCHS):
            with torch.no_grad():
                wanted = _states_after(dense, dense.get_submodule(blocks)[number], batch)
            loss = F.mse_loss(_states_after(model, block, batch), wanted)
            model.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = RATE * (num_steps - step) / num_steps
            optimizer.step()
            for weight, is_zero in zip(weights, zeros, strict=True):
                weight.data[is_zero] = 0.0
            losses.append(loss.item())
        errors.append((sum(losses[:2]) / 2, sum(losses[-2:]) / 2))
    return errors


@pytest.mark.parametrize("architecture", BLOCKS)
def test_blocks_are_fitted_as_a_naive_loop_fits_them(architecture):
    model, dense = _pruned(architecture)
    expected, base = copy.deepcopy(model), copy.deepcopy(model)
    wanted = _fit_naively(expected.eval(), dense.eval(), BLOCKS[architecture])
    found = []
    delta = gem_ds.fit_blocks(
        model,
        dense.train(),
        batches(),
        learning_rate=RATE,
        epochs=EPOCHS,
        report=lambda name, *errors: found.append(errors),
    )
    for errors, naive in zip(found, wanted, strict=True):
        assert errors == pytest.approx(naive, rel=1e-4)
        assert errors[1] < errors[0]
    targets = find_targets(base, ["all-linear"])
    for name, before in base.named_parameters():
        after = model.get_parameter(name).detach()
        assert torch.allclose(after, expected.get_parameter(name), atol=2e-5), name
        if name in targets:
            assert torch.equal(after == 0, before == 0)
            assert not torch.equal(after, before)
        else:
            assert torch.equal(bits(after), bits(before.detach()))
    assert dense.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    gem_ds.apply_delta(base, delta)
    for name, parameter in model.named_parameters():
        assert torch.equal(bits(base.get_parameter(name).detach()), bits(parameter.detach())), name


def test_a_mask_says_what_is_trained_in_bf16():
    model, dense = (each.to(torch.bfloat16) for each in _pruned("llama"))
    before = copy.deepcopy(model)
    mask = gem_ds.select_mask(model, rule="magnitude", density="0.05", target_modules="all-linear")
    delta = gem_ds.fit_blocks(model, dense, batches(), mask=mask, learning_rate=RATE)
    assert 0 < delta.mask.num_selected == mask.num_selected
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        changed = (bits(parameter.detach()) != bits(before.get_parameter(name).detach())).flatten()
        index = mask.indices.get(name, torch.empty(0, dtype=torch.int64)).long()
        assert not torch.isin(changed.nonzero().flatten(), index, invert=True).any(), name
        if len(index) > 5:
            assert changed.any(), name


def test_bf16_is_rounded_once():
    """Steps of at most a fifth of half a last place add up, as none would that is rounded."""
    model, dense = (each.to(torch.bfloat16) for each in _pruned("llama"))
    before = copy.deepcopy(model)
    delta = gem_ds.fit_blocks(model, dense, batches(), learning_rate=2e-4, epochs=20)
    is_changed = [
        model.get_parameter(name).detach()[large] != weight.detach()[large]
        for name, weight in before.named_parameters()
        if name in delta.mask.indices and (large := weight.detach().abs() >= 0.25).any()
    ]
    assert torch.cat(is_changed).any()


def test_one_block_at_a_time_is_on_the_device_and_has_gradients(monkeypatch):
    model, dense = _pruned("llama")
    visited: set[nn.Module] = set()
    there: list[nn.Module] = []
    move, output = nn.Module.to, BlockByBlock.output

    def watched_move(self: nn.Module, *where: Any, **how: Any) -> nn.Module:
        there.remove(self) if self in there else there.append(self)
        assert len(there) <= 1, "two blocks are on the device"
        return move(self, *where, **how)

    def watched_output(self: BlockByBlock, name: str, *more: Any) -> Tensor:
        assert there == [self.blocks[name]]
        visited.add(there[0])
        own = set(there[0].parameters())
        others = [p for p in [*model.parameters(), *dense.parameters()] if p not in own]
        assert not any(p.grad is not None for p in others)
        assert not any(p.requires_grad for p in model.parameters() if p not in own)
        return output(self, name, *more)

    monkeypatch.setattr(nn.Module, "to", watched_move)
    monkeypatch.setattr(BlockByBlock, "output", watched_output)
    gem_ds.fit_blocks(model, dense, batches(), epochs=1)
    assert not there
    assert visited == {*model.model.layers, *dense.model.layers}


def _wider() -> Any:
    return AutoModelForCausalLM.from_config(tiny_config("llama", intermediate_size=10))


def _adding_between(model: Any) -> Any:
    model.model.layers[1].register_forward_pre_hook(lambda m, args: (args[0] + 1, *args[1:]))
    return model


def _with_a_forward_of_its_own(model: Any) -> Any:
    model.model.layers[1].forward = model.model.layers[1].forward
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, d: (m, _wider(), batches()), "gate_proj.weight in shape .10, 20. and the pru"),
        (lambda m, d: (d, d, batches()), "more than 5% zeros: pass the pruned model first"),
        (lambda m, d: (m, d, []), "nothing to fit to: pass at least one batch"),
        (lambda m, d: (_adding_between(m), d, batches()), "are no chain in which each reads"),
        (
            lambda m, d: (_with_a_forward_of_its_own(m), d, batches()),
            "without device_map",
        ),
        (lambda m, d: (m.to("meta"), d, batches()), "not whole in this process"),
    ],
)
def test_what_cannot_be_fitted_is_refused_unchanged(change, message):
    model, dense = _pruned("llama")
    before = copy.deepcopy(model)
    first, second, given = change(model, dense)
    with pytest.raises(ValueError, match=message):
        gem_ds.fit_blocks(first, second, given)
    for found, wanted in zip(first.parameters(), before.parameters(), strict=False):
        assert found.is_meta or first is dense or torch.equal(found, wanted)


def test_a_rate_that_is_too_large_is_a_sentence():
    model, dense = _pruned("llama")
    with pytest.raises(ValueError, match=r"layers\.0 is not finite: lower the learning rate"):
        gem_ds.fit_blocks(model, dense, batches(), learning_rate=1e30)
