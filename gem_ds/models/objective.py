"""What is learnt of a task and how its answers are predicted, by kind of task and of model.

    kind      causal model                                 encoder's head
    text      write the answer                             -
    labels    write the right one, or rank the candidates  cross-entropy over the labels of a pair
    choices   the same                                     cross-entropy over the candidates' pairs
    number    write the number                             squared error of a pair's number

What is written (text; numbers of causal models) is predicted by generation (`gem_ds.evaluate`).
A causal model predicts a label or a choice by the likeliest candidate, however it was trained:

    score(c) = 1/|c| * sum_t log p(c_t | prompt, c_<t)       c_t: the |c| tokens of a candidate
    prediction = argmax over c of score(c), ties to the first
    loss       = -log softmax(score)[right candidate]        (--classification_loss candidates)

Losses are summed over examples. All candidates of an example stand in the same micro-batch. Two of
which one begins the other, their last tokens left out, share a sequence: where candidates have one
token, B examples are a forward pass of B sequences, and never of more than B for each candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gem_ds.data.batches import SummedLoss
from gem_ds.data.dataset import Dataset
from gem_ds.data.encode import encode_candidates, encode_texts
from gem_ds.data.pairs import encode_pairs
from gem_ds.data.tasks import Kind
from gem_ds.distributed.comm import Comm
from gem_ds.models.loss import answer_logits, summed_answer_loss

Predict = Callable[[nn.Module, dict[str, Tensor]], Tensor]
"""Takes a model and a batch of n examples; index of the answer int64 [n] (-1 if a score is NaN), or
the number fp32 [n]."""

Encode = Callable[..., Dataset]
"""Examples, tokenizer and max_length to a dataset; of texts also `truncate_left`."""


class Predictor(NamedTuple):
    """How answers are predicted without writing them."""

    encode: Encode
    predict: Predict


class Objective(NamedTuple):
    """What is learnt, and how answers are predicted (None: by generation)."""

    encode: Encode
    summed_loss: SummedLoss
    predictor: Predictor | None


def objective_of(
    kind: Kind, *, is_encoder: bool, classification_loss: Literal["tokens", "candidates"] = "tokens"
) -> Objective:
    """The objective of a task of some kind; refuses a loss of candidates where there are none."""
    has_candidates = kind in ("labels", "choices") and not is_encoder
    if classification_loss == "candidates" and not has_candidates:
        raise ValueError(
            "--classification_loss candidates is for causal models on tasks with candidates: "
            "leave it out."
        )
    if is_encoder:
        assert kind != "text", "gem_ds.models.encoders.set_head refuses it"
        return Objective(encode_pairs, summed_pair_loss, Predictor(encode_pairs, predict_pairs))
    ranking = Predictor(encode_candidates, predict_candidates)
    if classification_loss == "candidates":
        return Objective(encode_candidates, summed_candidate_loss, ranking)
    return Objective(encode_texts, summed_answer_loss, ranking if has_candidates else None)


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

    Rows of about one length share a batch, the longest first, so that what does not fit is known at
    once. Batches are cut as they are on one rank and dealt out in turn, so predictions are the same
    on any number of ranks. All run the same number of forward passes, as ZeRO-3 demands: one that
    has no batch left runs one without rows. The model is put into eval mode.
    """
    model.eval()
    order = dataset.widths.argsort(descending=True, stable=True)
    own: list[list[int] | list[float]] = []
    for start in range(0, len(dataset), batch_size * comm.world_size):
        first = start + batch_size * comm.rank
        batch = dataset.collate(order[first : first + batch_size].tolist(), pad_token_id)
        own.append(predict(model, {k: v.to(comm.device) for k, v in batch.items()}).tolist())
    turns = zip(*comm.gather_objects(own), strict=True)
    found = [prediction for turn in turns for part in turn for prediction in part]
    by_row = dict(zip(order.tolist(), found, strict=True))
    predictions = [by_row[row] for row in range(len(dataset))]
    with comm.in_unison():
        if not all(p >= 0 if isinstance(p, int) else math.isfinite(p) for p in predictions):
            raise ValueError(
                "The model's scores are not finite: check the model, or use bf16 or fp32 instead "
                "of fp16."
            )
    return predictions


def summed_candidate_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of a batch of `encode_candidates`, summed over its examples; fp32 scalar."""
    scores = _candidate_scores(model, batch)
    return F.cross_entropy(scores, batch["answers"], reduction="sum")


def predict_candidates(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The likeliest candidate of each example: int64 [n], as `best_choice`."""
    return best_choice(_candidate_scores(model, batch))


def summed_pair_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of a batch of `encode_pairs`, summed over its examples; fp32 scalar."""
    outputs, answers = _head_outputs(model, batch), batch["answers"]
    if answers.is_floating_point():
        return (outputs[:, 0] - answers).square().sum()
    return F.cross_entropy(outputs, answers, reduction="sum")


def predict_pairs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The best label or candidate of each example (int64 [n], as `best_choice`), or the number."""
    outputs = _head_outputs(model, batch)
    return outputs[:, 0] if batch["answers"].is_floating_point() else best_choice(outputs)


def best_choice(scores: Tensor) -> Tensor:
    """Index of the largest of each row's scores [n, C], the first of several: int64 [n].

    -1 where a score is NaN, so that nothing is best.
    """
    return scores.argmax(dim=1).masked_fill(scores.isnan().any(dim=1), -1)


def mean_log_likelihoods(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Of the tokens of each candidate of a batch of `encode_candidates`: fp32 [S]."""
    texts = {key: batch[key] for key in ("input_ids", "attention_mask", "answer_positions")}
    log_probabilities = answer_logits(model, texts).float().log_softmax(dim=1)
    likelihoods = log_probabilities[batch["answer_rows"], batch["answer_tokens"]]
    tokens = batch["candidate_tokens"]
    return _in_groups(likelihoods, tokens, 0.0).sum(dim=1) / (tokens >= 0).sum(dim=1)


def _candidate_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return _in_groups(mean_log_likelihoods(model, batch), batch["candidates"], -torch.inf)


def _head_outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """fp32 [n, labels], [n, candidates], or [n, 1] the number."""
    inputs = {key: value for key, value in batch.items() if key not in ("candidates", "answers")}
    logits: Tensor = model(**inputs).logits.float()
    candidates = batch["candidates"]
    if logits.shape[1] > 1:  # the head scores labels, of one pair each
        return logits[candidates[:, 0]]
    return _in_groups(logits[:, 0], candidates, -torch.inf)


def _in_groups(numbers: Tensor, rows: Tensor, filling: float) -> Tensor:
    """Numbers [S] of rows as [n, C] of groups (`rows_of_groups`), the filling where is no row."""
    return numbers[rows.clamp(min=0)].masked_fill(rows < 0, filling)
