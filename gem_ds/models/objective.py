"""What is learnt of a task and how its answers are predicted, by kind of task and of model.

    kind      causal model                                 encoder
    text      write the answer                             -
    labels    write the right one, or rank the candidates  classify the pair
    choices   the same                                     score each candidate's pair
    number    write the number                             regression

A causal model predicts a label or a choice by the likeliest candidate, however it was trained. What
is written (text; numbers of causal models) is predicted by generation, which is `eval`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from gem_ds.data.batches import SummedLoss
from gem_ds.data.dataset import Dataset
from gem_ds.data.encode import encode_candidates, encode_pairs, encode_texts
from gem_ds.data.tasks import Example, Kind
from gem_ds.models.choices import (
    Predict,
    predict_candidates,
    predict_pairs,
    summed_candidate_loss,
    summed_pair_loss,
)
from gem_ds.models.loss import summed_answer_loss

Encode = Callable[[Sequence[Example], PreTrainedTokenizerBase, int], Dataset]
"""Examples, tokenizer and max_length to a dataset."""


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """How answers are predicted without writing them."""

    encode: Encode
    predict: Predict


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is learnt, and how answers are predicted (None: by generation)."""

    encode: Encode
    summed_loss: SummedLoss
    predictor: Predictor | None


def objective_of(
    kind: Kind, *, is_encoder: bool, classification_loss: Literal["tokens", "candidates"] = "tokens"
) -> Objective:
    """The objective of a task of some kind; refuses a loss of candidates where there are none."""
    has_candidates = kind in ("labels", "choices") and not is_encoder
    ranking = Predictor(encode=encode_candidates, predict=predict_candidates)
    if classification_loss == "candidates":
        if not has_candidates:
            raise ValueError(
                "--classification_loss candidates is for causal models on tasks with candidates: "
                "leave it out."
            )
        loss = summed_candidate_loss
        return Objective(encode=encode_candidates, summed_loss=loss, predictor=ranking)
    if is_encoder:
        assert kind != "text", "gem_ds.models.encoders.set_head refuses it"
        head = Predictor(encode=encode_pairs, predict=predict_pairs)
        return Objective(encode=encode_pairs, summed_loss=summed_pair_loss, predictor=head)
    predictor = ranking if has_candidates else None
    return Objective(encode=encode_texts, summed_loss=summed_answer_loss, predictor=predictor)
