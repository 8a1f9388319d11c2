"""The oracle's optimizer against torch.optim.AdamW, its gradients against one backward pass."""

from typing import Any

import torch
from torch import nn

from tests import oracle

STEPS = 6
SETTINGS: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def test_masked_adamw_is_torch_adamw_on_the_masked_entries():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (5, 7), "b": (4, 3)}
    weights = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    masks = {n: torch.rand(s, generator=generator) < 0.4 for n, s in shapes.items()}
    before = {n: w.clone() for n, w in weights.items()}

    picked = {n: nn.Parameter(w[masks[n]].clone()) for n, w in weights.items()}
    reference = torch.optim.AdamW(picked.values(), lr=0.0, **SETTINGS)
    dense = oracle.DenseMaskedAdamW(weights, masks, max_norm=1.0, **SETTINGS)
    norms = []
    for step in range(STEPS):
        lr = 0.01 * (step + 1)
        scale = 0.01 if step % 2 else 1.0  # so that clipping acts in some steps only
        grads = {n: scale * torch.randn(s, generator=generator) for n, s in shapes.items()}
        for name, parameter in picked.items():
            parameter.grad = grads[name][masks[name]].clone()
        torch.nn.utils.clip_grad_norm_(picked.values(), 1.0)
        reference.param_groups[0]["lr"] = lr
        reference.step()
        norms.append(dense.step(grads, lr))

    assert min(norms) < 1 < max(norms)
    for name, weight in weights.items():
        torch.testing.assert_close(weight[masks[name]], picked[name].detach())
        assert torch.equal(weight[~masks[name]], before[name][~masks[name]])


def test_summed_gradients_are_those_of_the_summed_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    model[0].weight.requires_grad_(False)
    batches = [torch.randn(rows, 4) for rows in (3, 1, 5)]
    found = oracle.summed_gradients(
        model, batches, lambda net, x: net(x).square().sum(), ["0.weight", "2.weight"]
    )
    assert not model[0].weight.requires_grad
    assert model[2].weight.requires_grad

    model[0].weight.requires_grad_(True)
    model(torch.cat(batches)).square().sum().backward()
    for name, gradient in found.items():
        expected = model.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected)
        assert model.get_parameter(name).dtype == gradient.dtype == torch.float32


def test_masks_prefer_the_lowest_index_among_equals():
    r = torch.tensor([[1.0, 3.0, 2.0], [2.0, 0.0, 2.0]])
    assert oracle.mask(r, 3).tolist() == [[False, True, True], [True, False, False]]
