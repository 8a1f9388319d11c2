"""A mask from what a trainer of transformers or TRL is about to learn: its data, collator, loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Trainer

from gem_ds.calibration.select_mask import select_mask
from gem_ds.files.mask import Mask


def select_mask_with(
    trainer: Trainer,
    num_batches: int | None = None,
    *,
    density: float | str | Decimal = "0.001",
    target_modules: Sequence[str] | str | None = None,
    rule: str = "gem",
    seed: int = 0,
    keep_zeros: bool | None = None,
) -> Mask:
    """Select the entries that a rule would train, by the gradient of a trainer's own loss.

    The trainer has the model without an adapter; a second one trains the mask:

        mask = gem_ds.select_mask_with(SFTTrainer(model, args, train_dataset=data), 64)
        trainer = SFTTrainer(
            model, args, train_dataset=data, peft_config=gem_ds.GemConfig(mask=mask)
        )

    Args:
        trainer: Its dataloader gives the batches, as its collator makes them (chat templates,
            packing, the loss of completions alone), and its ``compute_loss`` their loss, with that
            of a mixture's routers as :mod:`gem_ds.models.router_loss` weighs it. Under data
            parallelism each process reads its own batches, and all get the same mask.
        num_batches: How many each process reads (default: an epoch).
        density: As :func:`gem_ds.select_mask`, with what follows.
        target_modules: Names of modules.
        rule: One of :data:`gem_ds.select.rules.RULES`.
        seed: Of rules that choose by chance.
        keep_zeros: Whether entries that are exactly 0 are left out.

    Raises:
        ValueError: As :func:`gem_ds.select_mask`.
    """

    def summed_loss(model: Any, batch: Any) -> Tensor:
        batch = trainer._prepare_inputs(batch)
        if trainer.model_accepts_loss_kwargs:  # a mean over so many tokens, and the routers' loss
            count = trainer._get_num_items_in_batch([batch], trainer.args.device)
            items = torch.as_tensor(1 if count is None else count, device=trainer.args.device).sum()
            mean = trainer.compute_loss(model, batch, num_items_in_batch=items.clamp(min=1))
            return cast(Tensor, mean) * items
        size = next(len(value) for value in batch.values() if torch.is_tensor(value))
        return cast(Tensor, trainer.compute_loss(model, batch)) * size

    accelerator = trainer.accelerator
    with _by_itself(trainer):
        return select_mask(
            accelerator.unwrap_model(trainer.model),
            islice(trainer.get_train_dataloader(), num_batches),
            summed_loss,
            density=density,
            target_modules=target_modules,
            rule=rule,
            seed=seed,
            keep_zeros=keep_zeros,
            reduce=accelerator.reduce if accelerator.num_processes > 1 else None,
        )


@contextmanager
def _by_itself(trainer: Trainer) -> Iterator[None]:
    """While the block lasts, a batch's loss is that of no part of a step over several."""
    args, trainer.current_gradient_accumulation_steps = trainer.args, 1  # its next step sets it
    averages, args.average_tokens_across_devices = args.average_tokens_across_devices, False
    try:
        yield
    finally:
        args.average_tokens_across_devices = averages
