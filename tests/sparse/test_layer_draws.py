"""The layers that a step trains: how likely each is, against the oracle, and how often it comes."""

import pytest
import torch

from gem_ds.sparse import layer_draws
from gem_ds.sparse.layer_draws import LayerDraws
from tests import oracle


def _draws(n: int, share: float) -> LayerDraws:
    return LayerDraws([share] * n, [0] * n, share, seed=3)


@pytest.mark.parametrize(("n", "share"), [(5, 0.4), (8, 0.9), (3, 0.1)])
def test_probabilities_are_the_oracles(n, share):
    draws, bandit = _draws(n, share), oracle.LayerBandit(n, share, layer_draws.RATE)
    noise = torch.Generator().manual_seed(0)
    sizes = torch.linspace(0.5, 4.0, n)
    counts = torch.zeros(n)
    for step in range(60):
        drawn = draws.draw(step)
        norms = sizes * torch.rand(n, generator=noise)
        draws.update(drawn, norms.tolist())
        layers = torch.tensor(drawn).nonzero().flatten()
        bandit.learn(layers, norms[layers])
        counts[layers] += 1
        assert draws.probabilities == pytest.approx(bandit.p.tolist(), rel=1e-6)
        assert sum(draws.probabilities) == pytest.approx(share * n)
        assert max(draws.probabilities) <= 1.0
    assert draws.num_updates == counts.tolist()
    assert max(draws.probabilities) > 1.2 * min(draws.probabilities), "the premise: it has learnt"


def test_a_layer_comes_as_often_as_it_is_likely_and_the_largest_gradient_most_often():
    draws = _draws(6, 0.3)
    norms = [1.0, 1.0, 1.0, 1.0, 1.0, 3.0]
    for step in range(100):
        draws.update(draws.draw(step), norms)
    assert draws.probabilities.index(max(draws.probabilities)) == 5
    counts = torch.tensor([draws.draw(step) for step in range(1000, 5000)]).sum(dim=0)
    at_least_one = 1 - torch.tensor([1 - p for p in draws.probabilities]).prod()
    expected = torch.tensor(draws.probabilities) / at_least_one
    assert (counts / 4000).tolist() == pytest.approx(expected.tolist(), abs=0.03)


def test_a_draw_hangs_on_seed_step_and_probabilities_alone_and_one_layer_always_comes():
    one, other = _draws(4, 0.05), _draws(4, 0.05)
    found = [one.draw(step) for step in range(200)]
    assert all(map(any, found))
    assert [other.draw(step) for step in reversed(range(200))] == found[::-1]


def test_norms_that_are_not_finite_teach_nothing():
    draws = _draws(2, 0.5)
    draws.update([True, True], [float("inf"), 1.0])
    assert draws.probabilities == [0.5, 0.5]
    assert draws.num_updates == [1, 1]


def test_layers_without_entries_are_never_drawn_and_do_not_count():
    """The others are drawn as if there were no more."""
    some, all_ = _draws(3, 0.4), LayerDraws([0.0, 0.4, 0.4, 0.0, 0.4], [0] * 5, 0.4, seed=3)
    noise = torch.Generator().manual_seed(0)
    for step in range(60):
        norms = torch.rand(3, generator=noise).tolist()
        first, second, third = some.draw(step)
        some.update([first, second, third], norms)
        all_.update([False, first, second, False, third], [0.0, norms[0], norms[1], 0.0, norms[2]])
        assert all_.probabilities[1:3] + all_.probabilities[4:] == pytest.approx(some.probabilities)
        assert all_.probabilities[0] == all_.probabilities[3] == 0.0
        assert any(all_.draw(step)[i] for i in (1, 2, 4))
