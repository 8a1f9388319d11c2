"""A transformers model that answers batches: left padding, a cache, stop strings, any noise.

A completion ends before the first stop string in its text, at an eos token, or at its limit. What
a batch holds beside a request does not change its completion, up to the ties that
`evaluate.generation` describes (greedy: ties between the two largest logits).

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

from gem_ds.evaluate.arguments import sparing_memory
from gem_ds.evaluate.generation import (
    Completion,
    GenerationSettings,
    Request,
    make_batches,
    uniform,
)

_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that make none
_FILLER = 0  # masked out, so any token will do


class Transformers:
    """A transformers model, whole on this rank or partitioned over all.

    It must be in eval mode; its own sampling parameters and penalties are ignored. With
    `synced_ranks` its weights are partitioned over ranks, all of which answer a batch at the same
    time: each runs as many forward passes as the one that needs most.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationSettings,
        *,
        batch_size: int,
        synced_ranks: bool = False,
    ) -> None:
        assert not model.training, "dropout would make the completions random"
        self.synced_ranks = synced_ranks
        self._batch_size = batch_size
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings

    def batches(self, requests: Sequence[Request]) -> list[list[list[Request]]]:
        """As `make_batches`."""
        return make_batches(requests, self._batch_size)

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer the requests of one batch, in their order.

        Raises:
            ValueError: The memory does not suffice, or the logits are not finite.
        """
        (limit,) = {request.limit for request in requests}
        rows = [_Row(request.prompt_ids) for request in requests]
        width = max(len(row.prompt_ids) for row in rows)
        with sparing_memory(f"{len(requests)} samples of up to {width + limit} tokens"):
            self._generate(requests, rows, width, limit)
        return [_completion(row, self._tokenizer, self._settings.stop_strings) for row in rows]

    def _generate(
        self, requests: Sequence[Request], rows: list[_Row], width: int, limit: int
    ) -> None:
        """Fill the rows with what the model writes."""
        model = self._model
        padding = [width - len(row.prompt_ids) for row in rows]
        input_ids = torch.tensor(
            [[_FILLER] * pad + row.prompt_ids for pad, row in zip(padding, rows, strict=True)]
        )
        attention_mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
        eos = _eos_token_ids(model, self._tokenizer)
        watch = _Watch(rows, self._tokenizer, self._settings.stop_strings, eos)
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
                logits_processor=LogitsProcessorList([NextToken(requests, self._settings, width)]),
                stopping_criteria=StoppingCriteriaList([watch]),
                synced_gpus=self.synced_ranks,
            )


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

    `width` is that of the padded prompts, so that the position in a completion is known.
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
        uniforms = [uniform(settings.seed, request.key, position) for request in self._requests]
        tokens = choose(
            scores,
            torch.tensor(uniforms, dtype=torch.float64, device=scores.device),
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens[:, None], 0.0)


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
        self._rows = rows
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._eos_token_ids = eos_token_ids
        self._window = 1 + max((len(stop.encode()) for stop in stop_strings), default=0)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Take one more token per row, `input_ids[:, -1]`; returns bool [rows], True if ended."""
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if row.finish_reason is None:
                row.new_ids.append(token)
                row.finish_reason = self._end(row)
        ended = [row.finish_reason is not None for row in self._rows]
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
        str(
            tokenizer.decode(
                tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )
        for tokens in (context, context + ids)
    )
    return whole[len(before) :]
