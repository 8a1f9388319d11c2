"""The optimizer against torch's own AdamW."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.distributed.optim import SparseAdamW

HYPERPARAMETERS = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-5, 1.0),
        "betas": st.tuples(st.floats(0.0, 0.99), st.floats(0.5, 0.9999)),
        "eps": st.sampled_from([1e-8, 1e-3, 1.0]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.3]),
    }
)


@settings(max_examples=40, deadline=None)
@given(HYPERPARAMETERS, st.integers(1, 50), st.integers(0, 2**32))
def test_twenty_steps_are_those_of_torch(hyper, size, seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator)
    ours = start.clone().requires_grad_()
    reference = start.double().requires_grad_()  # fp64, so that only our own rounding shows
    optimizers = [SparseAdamW([ours], **hyper), torch.optim.AdamW([reference], **hyper)]
    for step in range(20):
        gradient = torch.randn(size, generator=generator) * 10.0 ** (step % 5 - 3)
        ours.grad, reference.grad = gradient, gradient.double()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = hyper["lr"] / (1 + step)  # as a schedule sets it
            optimizer.step()
    scale = start.abs().max() + reference.abs().max()
    assert (ours - reference).abs().max() <= 20 * 3 * 2.0**-24 * scale, "three roundings a step"
    state, expected = optimizers[0].state[ours], optimizers[1].state[reference]
    assert state["step"] == 20
    for key in ("exp_avg", "exp_avg_sq"):
        assert ((state[key] - expected[key]).abs() <= 2e-6 * expected[key].abs().max()).all()


def test_state_is_two_fp32_numbers_for_each_entry_and_a_count_and_can_be_reset():
    """Of parameters that have a gradient; the others stay as they are, without a state."""
    still, weight = torch.ones(2, requires_grad=True), torch.ones(1001, requires_grad=True)
    optimizer = SparseAdamW([still, weight], lr=0.1, weight_decay=0.5)
    assert not optimizer.state, "nothing is allocated before the first step"
    weight.grad = torch.ones(1001)
    optimizer.step()
    assert still.tolist() == [1.0, 1.0]
    assert still not in optimizer.state
    tensors = [value for value in optimizer.state[weight].values() if torch.is_tensor(value)]
    assert sum(tensor.nbytes for tensor in tensors) == 8 * 1001
    assert not any(tensor.requires_grad for tensor in tensors)
    assert set(optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(vars(optimizer)) == set(vars(torch.optim.SGD([weight]))), "none hangs on the object"
    state = optimizer.reset_state(weight)
    assert state is optimizer.state[weight]
    assert state["exp_avg"] is tensors[0], "no room is made for others"
    assert state["exp_avg_sq"] is tensors[1]
    assert state["step"] == 0
    assert not state["exp_avg"].any()
    assert not state["exp_avg_sq"].any()
