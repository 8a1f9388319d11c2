"""What --optimizer adamw_8bit makes, with a stand-in for bitsandbytes, which few machines have."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from gem_ds.train.arguments import parse_arguments
from gem_ds.train.config import TrainArguments
from gem_ds.train.optimizer import make_dense_optimizer
from gem_ds.train.prepare import prepare


@pytest.fixture(autouse=True)
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    class AdamW8bit(torch.optim.AdamW):
        """Takes what bitsandbytes' takes, and keeps it where torch's does."""

    module = ModuleType("bitsandbytes.optim")
    module.AdamW8bit = AdamW8bit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)


def test_eight_bits_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is read: bitsandbytes would fail at the first step."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = "--method full --optimizer adamw_8bit --model_name_or_path nowhere --task rte"
    arguments = parse_arguments([*flags.split(), "--output_dir", "nowhere"])
    with pytest.raises(ValueError, match=r"^--optimizer adamw_8bit needs a GPU: .*\.$"):
        prepare(arguments, world_size=1)


@pytest.mark.parametrize("with_head", [False, True])
def test_eight_bits_get_the_groups_and_what_the_flags_say(
    monkeypatch: pytest.MonkeyPatch, with_head: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    body, head = [nn.Parameter(torch.zeros(2))], [nn.Parameter(torch.zeros(3))] * with_head
    optimizer = make_dense_optimizer(
        TrainArguments(
            optimizer="adamw_8bit",
            learning_rate=0.1,
            head_learning_rate=0.2,
            weight_decay=0.3,
            adam_beta1=0.4,
            adam_beta2=0.5,
            adam_epsilon=0.6,
        ),
        body,
        head,
    )
    assert type(optimizer).__name__ == "AdamW8bit"
    expected = [(body, 0.1), (head, 0.2)][: 1 + with_head]
    assert [(group["params"], group["lr"]) for group in optimizer.param_groups] == expected
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.4, 0.5), 0.6, 0.3)
