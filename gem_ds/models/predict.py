"""Predictions of a whole dataset, shared over the ranks.

Batches are cut as they are on one rank and dealt out in turn, so predictions are the same on any
number of ranks. All ranks run the same number of forward passes, as ZeRO-3 demands: one that has no
batch left runs one without rows.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from gem_ds.data.dataset import Dataset
from gem_ds.distributed.comm import Comm
from gem_ds.models.objective import Predict


@torch.no_grad()
def predict_all(
    model: nn.Module,
    dataset: Dataset,
    predict: Predict,
    comm: Comm,
    *,
    batch_size: int,
    pad_token_id: int,
) -> list[int] | list[float]:
    """The prediction for each row, in order; the same on every rank. All ranks call this together.

    Args:
        model: is put into eval mode.
        dataset: what ``predict`` reads.
        predict: of one batch.
        comm: the ranks.
        batch_size: rows per rank and forward pass.
        pad_token_id: fills sequences up to the longest.

    Raises:
        ValueError: a score is not finite, so that there is no best one.
    """
    model.eval()
    chunks = [
        range(first, min(first + batch_size, len(dataset)))
        for first in range(0, len(dataset), batch_size)
    ]
    own: list[list[int] | list[float]] = []
    for start in range(0, len(chunks), comm.world_size):
        turn = chunks[start : start + comm.world_size]
        rows = turn[comm.rank] if comm.rank < len(turn) else range(0)
        batch = dataset.collate(rows, pad_token_id)
        own.append(predict(model, {k: v.to(comm.device) for k, v in batch.items()}).tolist())
    by_rank = comm.gather_objects(own)
    predictions = [
        prediction
        for turn in range(len(own))
        for rank in range(comm.world_size)
        for prediction in by_rank[rank][turn]
    ]
    assert len(predictions) == len(dataset)
    with comm.in_unison():
        if not all(map(_is_made, predictions)):
            raise ValueError(
                "The model's scores are not finite: check the model, or use bf16 or fp32 instead "
                "of fp16."
            )
    return predictions


def _is_made(prediction: int | float) -> bool:
    return prediction >= 0 if isinstance(prediction, int) else math.isfinite(prediction)
