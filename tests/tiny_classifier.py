"""A small random encoder with a head for three labels, and pairs of random tokens for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification

from gem_ds.data.dataset import Dataset
from tests.tiny import tiny_config

NUM_EXAMPLES = 17


def make_classifier(dtype: torch.dtype = torch.float32) -> BertForSequenceClassification:
    """Always the same weights; no dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(tiny_config("classifier")).to(dtype)


def random_pairs() -> Dataset:
    """Random pairs of 3 to 13 tokens with one of three labels."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 14, (NUM_EXAMPLES,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(offsets[-1])
    return Dataset(
        tokens=torch.randint(1, 30, (total,), generator=generator).int(),
        types=torch.randint(0, 2, (total,), generator=generator).int(),
        offsets=offsets,
        groups=torch.arange(NUM_EXAMPLES + 1),
        truncated=torch.zeros(NUM_EXAMPLES, dtype=torch.bool),
        answers=torch.randint(0, 3, (NUM_EXAMPLES,), generator=generator),
    )


def naive_pair_loss(model: nn.Module, i: int) -> Tensor:
    """Of one example, without batch or padding."""
    data = random_pairs()
    own = slice(int(data.offsets[i]), int(data.offsets[i + 1]))
    assert data.types is not None
    assert data.answers is not None
    logits = model(
        input_ids=data.tokens[None, own].long(), token_type_ids=data.types[None, own].long()
    ).logits
    return F.cross_entropy(logits, data.answers[i : i + 1], reduction="sum")
