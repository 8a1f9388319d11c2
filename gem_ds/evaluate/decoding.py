"""A transformers model that answers batches: left padding, a cache, stop strings, any noise.

A completion ends before the first stop string in its text, at an eos token, or at its limit. What
else a batch holds does not change it, up to the ties that `evaluate.generation` describes.

    p      = softmax(logits / temperature), cut to the fewest most likely tokens of share >= top_p
    token  = the first, in vocabulary order, up to which p has the share u of its total

Everything after the logits is done in fp64, so it adds nothing to their rounding.
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
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from gem_ds.evaluate.generation import (
    Completion,
    GenerationSettings,
    Request,
    make_batches,
    sparing_memory,
    uniform,
)

_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that make none
_FILLER = 0  # masked out, so any token will do


@dataclass
class Transformers:
    """A model in eval mode, whole on this rank or partitioned over all.

    Its own sampling parameters and penalties are ignored. With `synced_ranks` it is partitioned:
    all ranks answer a batch at the same time, each in as many forward passes as the longest needs.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: GenerationSettings
    batch_size: int
    synced_ranks: bool = False

    def batches(self, requests: Sequence[Request]) -> list[list[list[Request]]]:
        """As `make_batches`."""
        return make_batches(requests, self.batch_size)

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer the requests of one batch, in their order."""
        assert not self.model.training, "dropout would make the completions random"
        (limit,) = {request.limit for request in requests}
        rows = [_Row(request.prompt_ids) for request in requests]
        width = max(len(row.prompt_ids) for row in rows)
        with sparing_memory(f"{len(requests)} samples of up to {width + limit} tokens"):
            self._generate(requests, rows, width, limit)
        return [_completion(row, self.tokenizer, self.settings.stop_strings) for row in rows]

    def _generate(
        self, requests: Sequence[Request], rows: list[_Row], width: int, limit: int
    ) -> None:
        model = self.model
        padding = [width - len(row.prompt_ids) for row in rows]
        input_ids = torch.tensor(
            [[_FILLER] * pad + row.prompt_ids for pad, row in zip(padding, rows, strict=True)]
        )
        attention_mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
        own = model.generation_config and model.generation_config.eos_token_id
        eos = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id}
        watch = _Watch(rows, self.tokenizer, self.settings.stop_strings, eos)
        call: Any = model.generate
        with torch.inference_mode(), _plain_generation(model):
            call(
                input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=GenerationConfig(
                    do_sample=False,  # NextToken has drawn
                    num_beams=1,
                    max_new_tokens=limit,
                    pad_token_id=_FILLER,
                    use_cache=True,
                ),
                logits_processor=LogitsProcessorList([NextToken(requests, self.settings, width)]),
                stopping_criteria=StoppingCriteriaList([watch]),
                synced_gpus=self.synced_ranks,
            )


def choose(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Draw a token per row, int64 [rows], by inverting its distribution function.

    `logits` [rows, vocabulary] may be -inf, `uniforms` (fp64 [rows]) lie in (0, 1], the temperature
    is above 0 and `top_p` in (0, 1].
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


@dataclass
class NextToken(LogitsProcessor):
    """Leaves each row one token to choose; where decoding is greedy, checks the logits only."""

    requests: Sequence[Request]
    settings: GenerationSettings
    width: int  # of the padded prompts, so that the position in a completion is known

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        """Scores [rows, vocabulary] with -inf for all tokens but the drawn one."""
        if not scores.amax(-1).isfinite().all():
            raise ValueError(
                "The model's logits are not finite, so there is no next token: its weights are "
                "damaged, or overflow in this --dtype (try bfloat16 or float32)."
            )
        settings = self.settings
        if settings.is_greedy:
            return scores
        position = input_ids.shape[1] - self.width
        uniforms = [uniform(settings.seed, request.key, position) for request in self.requests]
        noise = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)
        tokens = choose(scores, noise, temperature=settings.temperature, top_p=settings.top_p)
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens[:, None], 0.0)


@dataclass
class _Row:
    """One prompt at work: its tokens, those that follow, and why they ended, once they have."""

    prompt_ids: list[int]
    new_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class _Watch(StoppingCriteria):
    """Collects the new tokens of a batch's rows and says after each step which rows have ended.

    A stop string is looked for in the text of the last tokens, as many as it has bytes and one
    more, since a decoder may drop the space before its first token. Where these begin inside a
    character, up to three more are taken. What is found must stand in the whole text too: bytes
    that make no character can swallow it.
    """

    rows: list[_Row]
    tokenizer: PreTrainedTokenizerBase
    stop_strings: Sequence[str]
    eos_token_ids: set[int | None]  # the tokenizer's and those that the model was saved with

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Take one more token per row, `input_ids[:, -1]`; returns bool [rows], True if ended."""
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if row.finish_reason is None:
                row.new_ids.append(token)
                row.finish_reason = self._end(row)
        ended = [row.finish_reason is not None for row in self.rows]
        return torch.tensor(ended, device=input_ids.device)

    def _end(self, row: _Row) -> str | None:
        """Why a row ends with its last token, or None if it goes on."""
        if row.new_ids[-1] in self.eos_token_ids:
            return "eos"
        shortest = 1 + max((len(stop.encode()) for stop in self.stop_strings), default=0)
        for window in range(shortest, shortest + 4):
            context = row.prompt_ids[-1:] if len(row.new_ids) <= window else []
            text = _text_after(context, row.new_ids[-window:], self.tokenizer)
            if self._stops(text):
                whole = _text_after(row.prompt_ids, row.new_ids, self.tokenizer)
                return "stop" if self._stops(whole) else None
            if _NO_CHARACTER not in text:
                break
        return None

    def _stops(self, text: str) -> bool:
        return any(stop in text for stop in self.stop_strings)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Puts the model's generation_config aside: `generate` takes from it what a call leaves out."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


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
    skip_special_tokens: bool = False,
) -> str:
    """The text of `ids` where they follow `context`: at a start, decoders drop a space."""
    kept = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    before, whole = (str(tokenizer.decode(tokens, **kept)) for tokens in (context, context + ids))
    return whole[len(before) :]
