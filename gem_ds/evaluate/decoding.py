"""One batch of requests to completions: left padding, a cache, stop strings, any number of ranks.

A completion ends before the first stop string in its text, at an eos token, or at its limit. What
a batch holds beside a request does not change its completion, up to the ties that `evaluate.noise`
describes (greedy: ties between the two largest logits).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from gem_ds.evaluate.completion import Completion, GenerationSettings, Request
from gem_ds.evaluate.noise import NextToken

_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that make none


def decode_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    settings: GenerationSettings,
    *,
    synced_ranks: bool = False,
) -> list[Completion]:
    """Complete the requests; sampling parameters and penalties of the model are ignored.

    Args:
        model: A causal language model in eval mode.
        tokenizer: The model's tokenizer.
        requests: All with the same limit.
        settings: When a completion ends, and how its tokens are chosen.
        synced_ranks: The model's weights are partitioned over ranks, all of which are in this call:
            each runs as many forward passes as the one that needs most.

    Raises:
        ValueError: The logits are not finite.
    """
    assert not model.training, "dropout would make the completions random"
    (limit,) = {request.limit for request in requests}
    rows = [_Row(request.prompt_ids) for request in requests]
    watch = _Watch(rows, tokenizer, settings.stop_strings, _eos_token_ids(model, tokenizer))
    width = max(len(row.prompt_ids) for row in rows)
    padding = [width - len(row.prompt_ids) for row in rows]
    filler = 0  # masked out, so any token will do
    input_ids = torch.tensor(
        [[filler] * pad + row.prompt_ids for pad, row in zip(padding, rows, strict=True)]
    )
    attention_mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
    call: Any = model.generate
    with torch.inference_mode(), _plain_generation(model):
        call(
            input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=GenerationConfig(
                do_sample=False,  # NextToken has drawn
                num_beams=1,
                max_new_tokens=limit,
                pad_token_id=filler,
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([NextToken(requests, settings, width)]),
            stopping_criteria=StoppingCriteriaList([watch]),
            synced_gpus=synced_ranks,
        )
    return [_completion(row, tokenizer, settings.stop_strings) for row in rows]


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: the tokenizer's eos and those the model was saved with."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = own if isinstance(own, list) else [own]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Puts the model's generation_config aside: `generate` takes from it what a call leaves out."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@dataclass
class _Row:
    """One prompt at work: its tokens, those that follow, and why they ended, once they have."""

    prompt_ids: list[int]
    new_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class _Watch(StoppingCriteria):
    """Collects the new tokens of a batch's rows and says after each step which rows have ended.

    A stop string is looked for in the text of the last tokens, as many as it has bytes and one
    more, since a decoder may drop the space before its first token. Where these begin inside a
    character they say nothing, and up to three more are taken. What is found must stand in the
    whole text too: bytes that make no character can swallow it.
    """

    def __init__(
        self,
        rows: list[_Row],
        tokenizer: PreTrainedTokenizerBase,
        stop_strings: Sequence[str],
        eos_token_ids: set[int],
    ) -> None:
        self.rows = rows
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._eos_token_ids = eos_token_ids
        self._window = 1 + max((len(stop.encode()) for stop in stop_strings), default=0)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Take one more token per row, `input_ids[:, -1]`; returns bool [rows], True if ended."""
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if row.finish_reason is None:
                row.new_ids.append(token)
                row.finish_reason = self._end(row)
        ended = [row.finish_reason is not None for row in self.rows]
        return torch.tensor(ended, device=input_ids.device)

    def _end(self, row: _Row) -> str | None:
        """Why a row ends with its last token, or None if it goes on."""
        if row.new_ids[-1] in self._eos_token_ids:
            return "eos"
        for window in range(self._window, self._window + 4):
            context = row.prompt_ids[-1:] if len(row.new_ids) <= window else []
            text = self._text(context, row.new_ids[-window:])
            if self._stops(text):
                return "stop" if self._stops(self._text(row.prompt_ids, row.new_ids)) else None
            if _NO_CHARACTER not in text:
                break
        return None

    def _stops(self, text: str) -> bool:
        return any(stop in text for stop in self._stop_strings)

    def _text(self, context: list[int], ids: list[int]) -> str:
        return _text_after(context, ids, self._tokenizer, skip_special_tokens=False)


def _completion(
    row: _Row, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str]
) -> Completion:
    """What a finished row holds, cut before the first stop string."""
    ids = row.new_ids[:-1] if row.finish_reason == "eos" else row.new_ids
    text = _text_after(row.prompt_ids, ids, tokenizer, skip_special_tokens=True)
    cuts = [text.index(stop) for stop in stop_strings if stop in text]
    return Completion(
        text=text[: min(cuts, default=len(text))],
        num_tokens=len(row.new_ids),
        finish_reason="stop" if cuts else row.finish_reason or "length",
    )


def _text_after(
    context: list[int],
    ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    skip_special_tokens: bool,
) -> str:
    """The text of `ids` where they follow `context`: at a start, decoders drop a space."""
    before, whole = (
        tokenizer.decode(
            tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        for tokens in (context, context + ids)
    )
    assert isinstance(before, str)
    assert isinstance(whole, str)
    return whole[len(before) :]
