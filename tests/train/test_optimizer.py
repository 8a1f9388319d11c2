"""The schedule after a resume, and what --optimizer adamw_8bit makes.

With a stand-in for bitsandbytes, which few machines have.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from gem_ds.train.arguments import parse_arguments
from gem_ds.train.config import SCHEDULES, TrainArguments
from gem_ds.train.optimizer import make_dense_optimizer, make_scheduler
from gem_ds.train.prepare import prepare


@pytest.fixture(autouse=True)
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    class AdamW8bit(torch.optim.AdamW):
        """Takes what bitsandbytes' takes, and keeps it where torch's does."""

    module = ModuleType("bitsandbytes.optim")
    module.AdamW8bit = AdamW8bit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)


def test_eight_bits_need_a_gpu(monkeypatch):
    """Said before anything is read: bitsandbytes would fail at the first step."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = "--method full --optimizer adamw_8bit --model_name_or_path nowhere --task rte"
    arguments = parse_arguments([*flags.split(), "--output_dir", "nowhere"])
    with pytest.raises(ValueError, match=r"^--optimizer adamw_8bit needs a GPU: .*\.$"):
        prepare(arguments, world_size=1)


@pytest.mark.parametrize("with_head", [False, True])
def test_eight_bits_get_the_groups_and_what_the_flags_say(monkeypatch, with_head):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    body, head = [nn.Parameter(torch.zeros(2))], [nn.Parameter(torch.zeros(3))] * with_head
    adam = {"adam_beta1": 0.4, "adam_beta2": 0.5, "adam_epsilon": 0.6, "weight_decay": 0.3}
    rates = {"learning_rate": 0.1, "head_learning_rate": 0.2}
    train = TrainArguments(optimizer="adamw_8bit", **rates, **adam)
    optimizer = make_dense_optimizer(train, body, head)
    assert type(optimizer).__name__ == "AdamW8bit"
    expected = [(body, 0.1), (head, 0.2)][: 1 + with_head]
    assert [(group["params"], group["lr"]) for group in optimizer.param_groups] == expected
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.4, 0.5), 0.6, 0.3)


def rates_from(train: TrainArguments, num_updates: int = 0) -> list[list[float]]:
    """Of body and head in each of the 8 steps of a run that are left after so many updates."""
    body, head = [nn.Parameter(torch.zeros(2))], [nn.Parameter(torch.zeros(3))]
    optimizer = make_dense_optimizer(train, body, head)
    scheduler = make_scheduler(train, optimizer, 8, num_updates)
    rates = []
    for _ in range(num_updates, 8):
        rates.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("warmup_steps", "expected"), [(0.25, 2), (0.2, 2), (1, 1), (3.0, 3)])
def test_a_warmup_below_one_is_a_share_of_all_steps(warmup_steps, expected):
    rates = rates_from(TrainArguments(learning_rate=0.1, warmup_steps=warmup_steps))
    assert rates.index(max(rates)) == expected


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_schedule_goes_on_where_it_stopped(name):
    """After as many updates as were applied, in the warmup and behind it, for every group."""
    train = TrainArguments(
        learning_rate=0.1, head_learning_rate=0.2, warmup_steps=3, lr_scheduler_type=name
    )
    whole = rates_from(train)
    assert all(head == 2 * body for body, head in whole)
    assert [0.1, 0.2] in whole
    for num_updates in (1, 5):
        assert rates_from(train, num_updates) == whole[num_updates:]
