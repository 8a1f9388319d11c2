"""The optimizer and the learning-rate schedule that the flags ask for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from gem_ds.config import TrainArguments
from gem_ds.optim import SparseAdamW


def make_optimizer(train: TrainArguments) -> Callable[[list[nn.Parameter]], SparseAdamW]:
    """What makes the optimizer of the selected values."""
    return partial(
        SparseAdamW,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
    )


def make_scheduler(
    train: TrainArguments, optimizer: SparseAdamW, max_steps: int, num_updates: int
) -> LambdaLR:
    """The learning-rate schedule of transformers that the flags name, after ``num_updates``."""
    warmup = train.warmup_steps
    schedule = get_scheduler(
        train.lr_scheduler_type,
        optimizer,
        num_warmup_steps=round(warmup * max_steps if warmup < 1 else warmup),
        num_training_steps=max_steps,
    )
    return LambdaLR(optimizer, schedule.lr_lambdas, last_epoch=num_updates - 1)
