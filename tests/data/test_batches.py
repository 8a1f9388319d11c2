"""The order of the batches: a function of the step, the same on any number of ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.data.batches import BatchSchedule, permutation
from gem_ds.distributed.comm import Comm
from tests.tiny import make_batches, random_examples


def schedules(num_rows, global_batch_size, micro_batch_size, world_size, seed=0, lengths=None):
    sizes = {
        "num_rows": num_rows,
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
        "world_size": world_size,
    }
    return [
        BatchSchedule(**sizes, rank=rank, seed=seed, lengths=lengths) for rank in range(world_size)
    ]


@settings(max_examples=80, deadline=None)
@given(
    num_rows=st.integers(1, 50),
    global_batch_size=st.integers(1, 60),
    micro_batch_size=st.integers(1, 8),
    world_size=st.integers(1, 7),
    seed=st.integers(-(2**40), 2**70),
    is_grouped=st.booleans(),
)
def test_every_epoch_reads_every_row_once_on_any_world(
    num_rows, global_batch_size, micro_batch_size, world_size, seed, is_grouped
):
    lengths = torch.arange(num_rows) % 7 if is_grouped else None
    ranks = schedules(num_rows, global_batch_size, micro_batch_size, world_size, seed, lengths)
    (alone,) = schedules(num_rows, global_batch_size, 1, 1, seed, lengths)
    steps = alone.steps_per_epoch
    assert (steps - 1) * global_batch_size < num_rows <= steps * global_batch_size
    for epoch in (0, 1):
        read = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch = alone.global_batch(step)
            parts = [rank.micro_batches(step) for rank in ranks]
            assert all(rank.global_batch(step) == batch for rank in ranks)
            assert {len(part) for part in parts} == {ranks[0].num_micro_batches}
            assert max(len(micro) for part in parts for micro in part) <= micro_batch_size
            assert sorted(i for part in parts for micro in part for i in micro) == sorted(batch)
            shares = [sum(map(len, part)) for part in parts]
            assert max(shares) - min(shares) <= 1
            if len(batch) == global_batch_size:  # one more would be a forward pass in vain
                assert ranks[0].num_micro_batches == -(-max(shares) // micro_batch_size)
            else:
                assert step == epoch * steps + steps - 1
            read += batch
        assert is_grouped or read == permutation(num_rows, seed, epoch).tolist()
        assert sorted(read) == list(range(num_rows))


def test_a_batch_that_was_made_ahead_is_its_steps_own():
    dataset = random_examples(9)
    plain, ahead = (make_batches(dataset, Comm(torch.device("cpu")), 2, 2) for _ in range(2))
    for step, made in enumerate((None, 1, 3, 3, 9)):  # what was made before, of which step
        if made is not None:
            ahead.collate_ahead(made)
        pairs = zip(plain.micro_batches(step), ahead.micro_batches(step), strict=True)
        for expected, found in pairs:
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_rows_of_a_batch_are_of_about_one_length():
    """And every epoch has other batches, in an order that does not go by length."""
    lengths = torch.randint(5, 100, (1000,), generator=torch.Generator().manual_seed(0))
    (grouped,) = schedules(1000, 8, 8, 1, lengths=lengths)
    (shuffled,) = schedules(1000, 8, 8, 1)

    def padding(schedule, steps):
        batches = [lengths[schedule.global_batch(step)] for step in steps]
        return sum(int(batch.max()) * len(batch) - int(batch.sum()) for batch in batches)

    whole = range(124)  # the smaller batch is step 124
    assert padding(grouped, range(125)) < 0.1 * padding(shuffled, range(125))
    first, second = (
        {tuple(sorted(grouped.global_batch(125 * epoch + step))) for step in whole}
        for epoch in (0, 1)
    )
    assert not first & second
    means = torch.stack([lengths[grouped.global_batch(step)].float().mean() for step in whole])
    following = torch.corrcoef(torch.stack([means[:-1], means[1:]]))[0, 1]
    assert abs(following) < 0.3


def test_order_depends_on_seed_and_epoch_apart_and_on_nothing_else():
    """A generator seeded with seed + epoch would give run 1 the second epoch of run 0."""
    pairs = [(seed, epoch) for seed in range(5) for epoch in range(5)]
    orders = {tuple(permutation(30, *pair).tolist()) for pair in pairs}
    assert len(orders) == 25
    assert tuple(range(30)) not in orders
    (schedule,) = schedules(1000, 8, 1, 1)
    state = torch.get_rng_state()
    batches = [schedule.global_batch(step) for step in (400, 3, 126, 999, 3, 400)]
    batches[0].reverse()  # a caller's list is its own
    assert batches[1] == batches[4]
    assert batches[0][::-1] == batches[5]
    assert torch.equal(state, torch.get_rng_state())


def test_impossible_sizes_are_refused():
    for sizes, message in (
        ((0, 1, 1), "no training examples"),
        ((1, 0, 1), "global_batch_size is 0"),
        ((1, 1, -2), "micro_batch_size is -2"),
    ):
        with pytest.raises(ValueError, match=message):
            schedules(*sizes, world_size=1)
