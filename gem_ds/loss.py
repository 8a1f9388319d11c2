"""The loss of answers that are text: cross-entropy summed over their tokens.

Everything in GEM uses the *sum*; whoever needs a mean divides by the weight of the whole global
batch (here its number of answer tokens), so that no result depends on how a batch is cut into ranks
and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from gem_ds.texts import IGNORED_LABEL

SummedLoss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
"""Takes a model and a micro-batch; the loss summed over what the micro-batch's weight counts."""


def summed_answer_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of next-token losses at the labelled positions.

    Args:
        model: a causal language model of transformers, or an engine around one.
        batch: ``input_ids`` and ``labels`` [B, T] as :func:`gem_ds.texts.collate` lays them out,
            and what else the model's forward takes.

    Returns:
        fp32 scalar; 0 where nothing is labelled.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        batch["labels"][:, 1:].flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )
