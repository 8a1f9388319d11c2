"""Examples -> tokens: prompt and answer as the model reads them, and where the answer begins.

What this file does not do: read files (`data.tasks`), keep what it makes (`data.texts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import TemplateError

from gem_ds.data.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_SIZE = 1000  # examples per tokenizer call: enough to keep a fast tokenizer's threads busy


class Encoded(NamedTuple):
    """An example as tokens.

    Attributes:
        input_ids: At most `max_length`.
        prompt_length: How many of them are the prompt's; at least 1, and fewer than all.
        is_truncated: Whether the end of the answer was cut off.
    """

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
    (encoded,) = encode_all([example], tokenizer, max_length)
    return encoded.input_ids, encoded.prompt_length


def encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    has_eos: bool = True,
    numbers: Sequence[int] | None = None,
) -> Iterator[Encoded]:
    """Encode every example as `encode` does.

    Args:
        examples: What to encode.
        tokenizer: The model's.
        max_length: The most tokens of an example.
        has_eos: End each answer with an eos token.
        numbers: What errors call the examples (default: counted from 1).

    Raises:
        ValueError: As `encode`; the sentence names the example.
    """
    numbers = range(1, len(examples) + 1) if numbers is None else numbers
    for first in range(0, len(examples), _CHUNK_SIZE):
        chunk = slice(first, first + _CHUNK_SIZE)
        yield from _encode_chunk(examples[chunk], tokenizer, max_length, has_eos, numbers[chunk])


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
    has_eos: bool,
    numbers: Sequence[int],
) -> Iterator[Encoded]:
    """Encode some examples in two tokenizer calls."""
    if has_eos and tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, so the model could not learn where an "
            "answer stops: set eos_token in its tokenizer_config.json."
        )
    start_tokens = _start_tokens(tokenizer)
    rendered = [
        _render(example.prompt, tokenizer, start_tokens, number)
        for number, example in zip(numbers, examples, strict=True)
    ]
    prompts = _tokenize([text for text, _ in rendered], tokenizer)
    wholes = _tokenize(
        [text + example.target for (text, _), example in zip(rendered, examples, strict=True)],
        tokenizer,
    )
    eos = [tokenizer.eos_token_id] if has_eos else []
    for i, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
        if whole[: len(prompt)] == prompt:
            answer = whole[len(prompt) :]
        else:
            (answer,) = _tokenize([examples[i].target], tokenizer)
        prompt = _lead(rendered[i][1], prompt, tokenizer, numbers[i]) + prompt
        if len(prompt) >= max_length:
            raise ValueError(
                f"Example {numbers[i]} has a prompt of {len(prompt)} tokens, which leaves no "
                f"room for an answer within the max_length of {max_length}: raise --max_length, or "
                f"shorten or remove the example."
            )
        input_ids = [*prompt, *answer, *eos]
        if len(input_ids) == len(prompt):
            raise ValueError(
                f"Example {numbers[i]} has the candidate {examples[i].target!r}, which the "
                "tokenizer makes no tokens of, so it has no likelihood: write it out."
            )
        yield Encoded(input_ids[:max_length], len(prompt), len(input_ids) > max_length)


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
