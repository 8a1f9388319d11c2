"""Examples -> tokens: prompt and answer as the model reads them, and where the answer begins.

What this file does not do: read files (`gem_ds.tasks`), form batches (`gem_ds.data`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor

from gem_ds.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_SIZE = 1000  # examples per tokenizer call: enough to keep a fast tokenizer's threads busy


class _Encoded(NamedTuple):
    input_ids: list[int]
    prompt_length: int
    is_truncated: bool


def encode(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[int], int]:
    """Turn an example into `prompt tokens + answer tokens + eos`, cut at `max_length`.

    The prompt's tokens are those a generation would start from: the special tokens that the
    tokenizer puts at the start, then the text, never an eos. The answer's tokens are what
    `prompt + target` has beyond the prompt's tokens; where a token spans the border, the target is
    tokenized alone instead. Chat messages pass through the chat template, which then is in charge
    of the special tokens.

    Returns:
        The token ids (at most `max_length`) and how many of them are the prompt's (at least 1,
        and at least one fewer than there are ids).

    Raises:
        ValueError: The prompt alone fills `max_length`, or the tokenizer lacks what the example
            needs: an eos token, a bos token for an empty prompt, a chat template.
    """
    (encoded,) = _encode_chunk([example], tokenizer, max_length, first_number=1)
    return encoded.input_ids, encoded.prompt_length


def encode_prompt(
    prompt: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The token ids from which a generation starts: exactly the prompt part of `encode`."""
    text, start = _render(prompt, tokenizer, _start_tokens(tokenizer), number=1)
    (ids,) = _tokenize([text], tokenizer)
    return _lead(start, ids, tokenizer, number=1) + ids


def _encode_chunk(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    first_number: int,
) -> list[_Encoded]:
    """Encode some examples in two tokenizer calls; errors count examples from `first_number`."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, so the model could not learn where an "
            "answer stops: set eos_token in its tokenizer_config.json."
        )
    start_tokens = _start_tokens(tokenizer)
    rendered = [
        _render(example.prompt, tokenizer, start_tokens, number)
        for number, example in enumerate(examples, first_number)
    ]
    prompts = _tokenize([text for text, _ in rendered], tokenizer)
    wholes = _tokenize(
        [text + example.target for (text, _), example in zip(rendered, examples, strict=True)],
        tokenizer,
    )
    chunk = []
    for i, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
        if whole[: len(prompt)] == prompt:
            answer = whole[len(prompt) :]
        else:
            (answer,) = _tokenize([examples[i].target], tokenizer)
        prompt = _lead(rendered[i][1], prompt, tokenizer, first_number + i) + prompt
        if len(prompt) >= max_length:
            raise ValueError(
                f"Example {first_number + i} has a prompt of {len(prompt)} tokens, which leaves no "
                f"room for an answer within the max_length of {max_length}: raise --max_length, or "
                f"shorten or remove the example."
            )
        input_ids = [*prompt, *answer, tokenizer.eos_token_id]
        is_truncated = len(input_ids) > max_length
        chunk.append(_Encoded(input_ids[:max_length], len(prompt), is_truncated))
    return chunk


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before any text (mostly bos, or none)."""
    probe = "a"
    (plain,) = _tokenize([probe], tokenizer)
    full = tokenizer(probe)["input_ids"]
    num_added = len(full) - len(plain)
    return next(full[:n] for n in range(num_added + 1) if full[n : n + len(plain)] == plain)


def _render(
    prompt: str | list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    start_tokens: list[int],
    number: int,
) -> tuple[str, list[int]]:
    """A prompt as text, and the special tokens to put before it (a template writes its own)."""
    if isinstance(prompt, str):
        return prompt, start_tokens
    if tokenizer.chat_template is None:
        raise ValueError(
            f"Example {number} holds chat messages but the tokenizer has no chat template: use a "
            f"model that has one, or pass --prompt_field and --target_field."
        )
    try:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(
            f"The tokenizer's chat template refuses the messages of example {number} ({error}): "
            f"change their roles or their order."
        ) from error
    assert isinstance(text, str)
    return text, []


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, without special tokens and without a limit on the length."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _lead(
    start_tokens: list[int], ids: list[int], tokenizer: PreTrainedTokenizerBase, number: int
) -> list[int]:
    """The tokens before the prompt's text, so that the first answer token has one to follow."""
    if start_tokens or ids:
        return start_tokens
    if tokenizer.bos_token_id is None:
        raise ValueError(
            f"Example {number} has an empty prompt and the tokenizer has no bos token to stand for "
            f"it: give the example a prompt."
        )
    return [tokenizer.bos_token_id]


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedDataset:
    """Encoded examples, end to end in one tensor: example i is `tokens[offsets[i]:offsets[i+1]]`.

    Attributes:
        tokens: int32 [sum of lengths], the token ids.
        offsets: int64 [n + 1], rising from 0.
        prompt_lengths: int32 [n], each at least 1 and below the example's length.
        truncated: bool [n], whether the answer was cut.
    """

    tokens: Tensor
    offsets: Tensor
    prompt_lengths: Tensor
    truncated: Tensor

    @classmethod
    def encode(
        cls, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> EncodedDataset:
        """Encode every example as `encode` does.

        Raises:
            ValueError: As `encode`; the sentence names the example, counted from 1.
        """
        pieces, lengths, prompt_lengths, truncated = [], [], [], []
        for first in range(0, len(examples), _CHUNK_SIZE):
            chunk = examples[first : first + _CHUNK_SIZE]
            for encoded in _encode_chunk(chunk, tokenizer, max_length, first + 1):
                pieces.append(torch.tensor(encoded.input_ids, dtype=torch.int32))
                lengths.append(len(encoded.input_ids))
                prompt_lengths.append(encoded.prompt_length)
                truncated.append(encoded.is_truncated)
        return cls(
            tokens=torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32),
            offsets=torch.tensor([0, *lengths]).cumsum(0),
            prompt_lengths=torch.tensor(prompt_lengths, dtype=torch.int32),
            truncated=torch.tensor(truncated, dtype=torch.bool),
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def num_truncated(self) -> int:
        """How many examples lost the end of their answer to max_length."""
        return int(self.truncated.sum())

    @property
    def total_answer_tokens(self) -> int:
        """The number of tokens that carry loss, over all examples."""
        return len(self.tokens) - int(self.prompt_lengths.sum())

    def length(self, i: int) -> int:
        """Tokens of example `i`."""
        return int(self.offsets[i + 1] - self.offsets[i])

    def prompt_length(self, i: int) -> int:
        """Tokens of example `i` that are its prompt."""
        return int(self.prompt_lengths[i])

    def count_tokens(self, indices: Sequence[int]) -> int:
        """Tokens of these examples together."""
        index = torch.tensor(indices, dtype=torch.int64)
        return int((self.offsets[index + 1] - self.offsets[index]).sum())

    def count_answer_tokens(self, indices: Sequence[int]) -> int:
        """Tokens of these examples that carry loss: all but the prompts, which are never empty."""
        prompts = self.prompt_lengths[torch.tensor(indices, dtype=torch.int64)]
        return self.count_tokens(indices) - int(prompts.sum())

    def input_ids(self, i: int) -> Tensor:
        """Token ids of example `i`: int32 [length], a view."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def select(self, indices: Sequence[int]) -> EncodedDataset:
        """The dataset of `indices`, in their order."""
        index = torch.tensor(indices, dtype=torch.int64)
        lengths = self.offsets.diff()[index]
        pieces = [self.input_ids(i) for i in indices]
        return EncodedDataset(
            tokens=torch.cat(pieces) if pieces else self.tokens[:0],
            offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
            prompt_lengths=self.prompt_lengths[index],
            truncated=self.truncated[index],
        )

    def fingerprint(self) -> str:
        """SHA-256 of lengths, prompt lengths and tokens, so that a resume can refuse other data."""
        digest = hashlib.sha256()
        for tensor, dtype in (
            (self.offsets, "<i8"),
            (self.prompt_lengths, "<i4"),
            (self.tokens, "<i4"),
        ):
            digest.update(len(tensor).to_bytes(8, "little"))
            digest.update(tensor.numpy().astype(dtype, copy=False).tobytes())
        return digest.hexdigest()
