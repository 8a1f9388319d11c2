"""Completions of prompts: greedy decoding in batches, stopped at an eos token or a stop string.

    prompts -> tokens -> batches of similar length, padded on the left -> tokens -> text

A prompt's tokens are those of training (`gem_ds.encode.encode_prompt`). A completion ends before
the first stop string in its text, at an eos token, after `max_new_tokens`, or where the model's
positions end. What a batch holds beside a prompt does not change its completion, up to ties in the
logits that the rounding of padded rows can flip (seldom in fp32, now and then in 16 bits).

What this file does not do: sample at a temperature, run on several ranks, judge what was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from gem_ds.delta import Delta, apply_delta
from gem_ds.encode import encode_prompt
from gem_ds.mask import dtype_name
from gem_ds.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How completions are made, apart from what must not change them (the batch size).

    Attributes:
        max_new_tokens: The longest completion, in tokens.
        stop_strings: A completion ends before the first of these.
        temperature: Divides the logits; 0 is greedy.
        top_p: Tokens are drawn from the fewest most likely ones that have this share together.
        seed: Of the noise.
    """

    max_new_tokens: int
    stop_strings: tuple[str, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the model wrote after a prompt.

    Attributes:
        text: The text, without the stop string or special tokens; it continues the prompt's text
            exactly, so a leading space is kept.
        num_tokens: Tokens that were generated, the eos or those of the stop string among them.
        finish_reason: "eos", "stop" (a stop string) or "length".
    """

    text: str
    num_tokens: int
    finish_reason: str


def load_model(
    name: str,
    *,
    delta_path: str | Path | None = None,
    dtype: str = "auto",
    device: torch.device,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, with a delta applied if one is given, and its tokenizer.

    Args:
        name: Folder or Hub name of the (base) model.
        delta_path: delta.safetensors of a run on that model.
        dtype: "float32", "bfloat16", "float16", or "auto": that of the delta, without one that of
            the model's files.
        device: Where the model is to stand.

    Raises:
        ValueError: The model or its tokenizer cannot be loaded or is not whole, or the delta is
            invalid, for another model or of another dtype.
        FileNotFoundError: There is no such delta.
    """
    delta = None if delta_path is None else Delta.load(delta_path)
    if delta is not None:
        dtype = _delta_dtype(delta, dtype)
    # A revision is meaningful in the repository that it was recorded for only.
    recorded = delta is not None and delta.mask.base_model == name
    revision = (delta.mask.revision if delta is not None and recorded else None) or "main"
    try:
        tokenizer = load_tokenizer(name, revision)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--model_name_or_path {name} cannot be loaded: {reason}") from error
    if tokenizer is None:
        raise ValueError(
            f"--model_name_or_path {name} holds no tokenizer: save the model's tokenizer there."
        )
    model, report = loaded
    if missing := set(report["missing_keys"]) - (delta.head.keys() if delta else set()):
        raise ValueError(
            f"--model_name_or_path {name} lacks {len(missing)} weights of a "
            f"{type(model).__name__}, for example {min(missing)!r}: pass a complete model."
        )
    if delta is not None:
        apply_delta(model, delta)
    return model.to(device), tokenizer


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    settings: GenerationSettings,
    *,
    batch_size: int,
    show_bar: bool = True,
) -> list[Completion]:
    """Complete every prompt greedily; sampling parameters and penalties of the model are ignored.

    Args:
        model: A causal language model in eval mode.
        tokenizer: The model's tokenizer.
        prompts: Texts, or chat messages for the tokenizer's chat template.
        settings: When a completion ends.
        batch_size: Prompts per batch; it decides memory and speed only.
        show_bar: Whether a progress bar counts the prompts.

    Returns:
        The completions, in the order of `prompts`.

    Raises:
        ValueError: A prompt fills the model's positions or has tokens which the model lacks, or
            cannot be encoded (`encode_prompt`).
    """
    assert not model.training, "dropout would make the completions random"
    prompt_ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    limits = _limits(model, prompt_ids, settings.max_new_tokens)
    _check_vocabulary(model, prompt_ids)
    eos_token_ids = _eos_token_ids(model, tokenizer)
    completions: dict[int, Completion] = {}
    with (
        torch.inference_mode(),
        _plain_generation(model),
        tqdm(total=len(prompts), desc="Generating", unit="prompt", disable=not show_bar) as bar,
    ):
        for batch in _batches(prompt_ids, limits, batch_size):
            rows = [_Row(prompt_ids[i]) for i in batch]
            watch = _Watch(rows, tokenizer, settings.stop_strings, eos_token_ids)
            _run_batch(model, watch, limits[batch[0]])
            for i, row in zip(batch, rows, strict=True):
                completions[i] = _completion(row, tokenizer, settings.stop_strings)
            bar.update(len(batch))
    return [completions[i] for i in range(len(prompts))]


def _delta_dtype(delta: Delta, dtype: str) -> str:
    """The dtype in which a model can take the delta."""
    name = dtype_name(delta.dtype)
    if dtype not in ("auto", name):
        raise ValueError(
            f"--dtype {dtype} cannot hold the delta, whose values are {name}: leave --dtype out."
        )
    return name


def _limits(model: PreTrainedModel, prompt_ids: list[list[int]], max_new_tokens: int) -> list[int]:
    """The most tokens each completion may have, within the model's positions if it counts them."""
    config = model.config.get_text_config()
    num_positions = getattr(config, "max_position_embeddings", None)
    if num_positions is None:
        return [max_new_tokens] * len(prompt_ids)
    for number, ids in enumerate(prompt_ids, start=1):
        if len(ids) >= num_positions:
            raise ValueError(
                f"Prompt {number} has {len(ids)} tokens, which leaves no room for an answer in "
                f"the model's {num_positions} positions: use a model that reads more."
            )
    return [min(max_new_tokens, num_positions - len(ids)) for ids in prompt_ids]


def _check_vocabulary(model: PreTrainedModel, prompt_ids: list[list[int]]) -> None:
    """Refuses tokens beyond the embedding, where a GPU would only report a failed kernel."""
    largest = max((max(ids) for ids in prompt_ids), default=0)
    size = model.config.get_text_config().vocab_size
    if largest >= size:
        raise ValueError(
            f"The tokenizer makes token {largest} and the model knows {size} tokens: save the "
            "model's own tokenizer in its folder."
        )


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


def _batches(
    prompt_ids: list[list[int]], limits: list[int], batch_size: int
) -> Iterator[list[int]]:
    """Positions of prompts, longest first, in batches of one limit each.

    Limits differ only where prompts come near the end of the model's positions; there all prompts
    of a batch have one length, so no row runs past the end while another is at work.
    """
    order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    for _, group in groupby(order, key=lambda i: limits[i]):
        members = list(group)
        for first in range(0, len(members), batch_size):
            yield members[first : first + batch_size]


@dataclass
class _Row:
    """One prompt at work: its tokens, those that follow, and why they ended, once they have."""

    prompt_ids: list[int]
    new_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class _Watch(StoppingCriteria):
    """Collects the new tokens of a batch's rows and says after each step which rows have ended.

    A stop string is looked for in the text of the last tokens only, as many as it has bytes and one
    more, since a decoder may drop the space before its first token. What a row's text is, is up to
    `_completion`; what is decided here is when the row may stop costing time.
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
        context = row.prompt_ids[-1:] if len(row.new_ids) <= self._window else []
        tail = row.new_ids[-self._window :]
        text = _text_after(context, tail, self._tokenizer, skip_special_tokens=False)
        return "stop" if any(stop in text for stop in self._stop_strings) else None


def _run_batch(model: PreTrainedModel, watch: _Watch, limit: int) -> None:
    """Decode the watched rows greedily until all have ended, or for `limit` tokens."""
    prompt_ids = [row.prompt_ids for row in watch.rows]
    width = max(map(len, prompt_ids))
    padding = [width - len(ids) for ids in prompt_ids]
    filler = 0  # masked out, so any token will do
    input_ids = torch.tensor(
        [[filler] * pad + ids for pad, ids in zip(padding, prompt_ids, strict=True)]
    )
    attention_mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
    call: Any = model.generate
    call(
        input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=limit, pad_token_id=filler, use_cache=True
        ),
        stopping_criteria=StoppingCriteriaList([watch]),
    )


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
