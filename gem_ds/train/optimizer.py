"""The optimizer and the learning-rate schedule that the flags ask for."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from gem_ds.distributed.optim import SparseAdamW
from gem_ds.train.config import TrainArguments


def make_sparse_optimizer(train: TrainArguments, vectors: list[nn.Parameter]) -> SparseAdamW:
    """The optimizer of the selected values and, second if there is one, the head."""
    optimizer: SparseAdamW = _make(SparseAdamW, train, vectors[:1], vectors[1:])
    return optimizer


def make_dense_optimizer(
    train: TrainArguments, parameters: list[nn.Parameter], head: list[nn.Parameter]
) -> Optimizer:
    """AdamW of whole parameters, in eight bits if ``--optimizer`` says so."""
    # One pass over the parameters instead of a dozen: the baselines are as fast as torch can do it.
    adam: Any = partial(AdamW, fused=True)
    if train.optimizer == "adamw_8bit":
        adam = adam_of_bitsandbytes()
    optimizer: Optimizer = _make(adam, train, parameters, head)
    return optimizer


def _make(
    adam: Any, train: TrainArguments, parameters: list[nn.Parameter], head: list[nn.Parameter]
) -> Any:
    groups: list[dict[str, Any]] = [{"params": parameters, "lr": train.learning_rate}]
    if head:
        groups.append({"params": head, "lr": train.head_learning_rate})
    return adam(
        groups,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
    )


def adam_of_bitsandbytes() -> Any:
    """AdamW with moments in eight bits; a ValueError where it or a GPU is not there."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError(
            "--optimizer adamw_8bit needs bitsandbytes: pip install bitsandbytes."
        ) from None
    if not torch.cuda.is_available():
        raise ValueError("--optimizer adamw_8bit needs a GPU: pass --optimizer adamw.")
    return AdamW8bit


def make_scheduler(
    train: TrainArguments, optimizer: Optimizer, max_steps: int, num_updates: int
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
