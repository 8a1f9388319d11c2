"""Which token comes next: temperature, top-p, and one uniform number per token of a sample.

    u      = hash(seed, task id, sample number, position) in (0, 1)
    p      = softmax(logits / temperature), cut to the fewest most likely tokens of share >= top_p
    token  = the first, in vocabulary order, up to which p has the share u of its total

No generator has a state that would be moved by what else is sampled, so batches, their order,
interruptions and the number of ranks do not change a sample. What is left are the logits: a batch
pads its rows, and the kernels then round differently. In fp32 the border between two tokens moves
by about 1e-6 of the probability, so that one token in a million may flip, and with it the rest of
its sample. In bf16 the logits themselves are uncertain by several thousandths, and more samples
differ the longer they are; each remains a fair draw from the model. Measured by
`benchmarks/sampling_batches.py` on the embedded model, GSM8K, 100 samples of up to 128 tokens,
batches of 4 and of 32 against batches of 1: fp32 none; bf16 2 and 4 (greedy 5 and 9).

Everything after the logits is done in fp64, so it adds nothing to this.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from gem_ds.evaluate.completion import GenerationSettings, Request


def uniform(seed: int, task_id: str, sample: int, position: int) -> float:
    """A number in (0, 1), the same wherever and whenever it is asked for.

    Args:
        seed: Of the run.
        task_id: Of the problem.
        sample: Number of the sample.
        position: Of the token in its completion, from 0.
    """
    return (_bits(seed, task_id, sample, position) >> 12) * 2.0**-52 + 2.0**-53


def sample_seed(seed: int, task_id: str, sample: int) -> int:
    """A seed in [0, 2^63) for a generator that is not this file's, one per sample."""
    return _bits(seed, task_id, sample) >> 1


def choose(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Draw a token per row by inverting its distribution function.

    Args:
        logits: [rows, vocabulary], any float type; -inf excludes a token.
        uniforms: fp64 [rows], each in (0, 1].
        temperature: Above 0.
        top_p: In (0, 1].

    Returns:
        int64 [rows].
    """
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # no overflow however cold
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        kept = ordered.cumsum(-1) - ordered < top_p
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered * kept)
    cumulative = probabilities.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    # The first entry that reaches a positive target has a positive probability of its own.
    return torch.searchsorted(cumulative, target).squeeze(-1)


class NextToken(LogitsProcessor):
    """Leaves each row one token to choose; where decoding is greedy, checks the logits only.

    Args:
        requests: Of the batch's rows.
        settings: Temperature, top_p and seed.
        width: Tokens of the padded prompts, so that the position in a completion is known.
    """

    def __init__(
        self, requests: Sequence[Request], settings: GenerationSettings, width: int
    ) -> None:
        self._requests = requests
        self._settings = settings
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        """Scores [rows, vocabulary] with -inf for all tokens but the drawn one."""
        if not scores.amax(-1).isfinite().all():
            raise ValueError(
                "The model's logits are not finite, so there is no next token: its weights are "
                "damaged, or overflow in this --dtype (try bfloat16 or float32)."
            )
        settings = self._settings
        if settings.is_greedy:
            return scores
        position = input_ids.shape[1] - self._width
        uniforms = [uniform(settings.seed, *request.key, position) for request in self._requests]
        tokens = choose(
            scores,
            torch.tensor(uniforms, dtype=torch.float64, device=scores.device),
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens[:, None], 0.0)


def _bits(*key: int | str) -> int:
    """64 bits that depend on every part of the key."""
    return int.from_bytes(blake2b(json.dumps(key).encode(), digest_size=8).digest(), "big")
