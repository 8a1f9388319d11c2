"""Examples -> tokens: what the model reads and where the answer begins, for each kind of answer.

    encode_texts       prompt, answer and eos in one sequence: the model learns to write the answer
    encode_candidates  prompt and candidate, a sequence for each: which is the likeliest? Without an
                       eos: what follows an answer is no part of it, and a token that all candidates
                       share would weigh most in the shortest one
    encode_pairs       sentence pairs for an encoder's head: one, or one for each candidate

The prompt's tokens are those a generation would start from: the special tokens that the tokenizer
puts at the start, then the text, never an eos. The answer's tokens are what `prompt + target` has
beyond the prompt's tokens; where a token spans the border, the target is tokenized alone instead.
Chat messages pass through the chat template, which then is in charge of the special tokens. Pairs
are encoded as the tokenizer does it by itself; one that is too long loses tokens at the end of the
longer text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from jinja2 import TemplateError
from torch import Tensor

from gem_ds.data.dataset import Dataset, offsets_of
from gem_ds.data.tasks import ChoiceExample, Example, NumberExample, Pair, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_SIZE = 1000  # texts per tokenizer call: enough to keep a fast tokenizer's threads busy
_TYPES = "token_type_ids"


def encode_texts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Encode examples as `prompt tokens + answer tokens + eos`, cut at `max_length`.

    Raises:
        ValueError: A prompt alone fills `max_length`, or the tokenizer lacks what an example needs:
            an eos token, a bos token for an empty prompt, a chat template. The sentence names the
            example, counted from 1.
    """
    if examples and tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, so the model could not learn where an "
            "answer stops: set eos_token in its tokenizer_config.json."
        )
    rows = [[example] for example in examples]
    return _encode_rows(rows, tokenizer, max_length, [tokenizer.eos_token_id])


def encode_candidates(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Encode `prompt tokens + candidate tokens` for every candidate of every example.

    Raises:
        ValueError: As `encode_texts` (no eos is needed), or a candidate has no tokens.
    """
    choices = cast(Sequence[ChoiceExample], examples)
    rows = [[Example(prompt=e.prompt, target=text) for text in e.candidates] for e in choices]
    dataset = _encode_rows(rows, tokenizer, max_length, [])
    answers = torch.tensor([example.answer for example in choices], dtype=torch.int64)
    return replace(dataset, answers=answers)


def encode_pairs(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Encode every pair of every example.

    Raises:
        ValueError: `max_length` leaves no room beside the tokenizer's special tokens.
    """
    asked = cast(Sequence[ChoiceExample | NumberExample], examples)
    answers = [e.value if isinstance(e, NumberExample) else e.answer for e in asked]
    is_number = any(isinstance(example, NumberExample) for example in asked)
    pairs = [pair for example in asked for pair in example.pairs]
    encoded = list(_encode_pairs(pairs, tokenizer, max_length))
    has_types = _TYPES in tokenizer.model_input_names
    return Dataset(
        tokens=_flat([row["input_ids"] for row, _ in encoded]),
        types=_flat([row[_TYPES] for row, _ in encoded]) if has_types else None,
        offsets=offsets_of([len(row["input_ids"]) for row, _ in encoded]),
        groups=offsets_of([len(example.pairs) for example in asked]),
        truncated=torch.tensor([is_cut for _, is_cut in encoded], dtype=torch.bool),
        answers=torch.tensor(answers, dtype=torch.float32 if is_number else torch.int64),
    )


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids from which a generation starts: exactly the prompt part of `encode_texts`."""
    (ids,) = _tokenize([_render(prompt, tokenizer, number=1)], tokenizer)
    return _begun(prompt, ids, tokenizer, _start_tokens(tokenizer), number=1)


def _flat(rows: Sequence[list[int]]) -> Tensor:
    pieces = [torch.tensor(row, dtype=torch.int32) for row in rows]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[first : first + _CHUNK_SIZE] for first in range(0, len(items), _CHUNK_SIZE))


def _encode_rows(
    rows: Sequence[Sequence[Example]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    eos: list[int],
) -> Dataset:
    """Every text of every row as a sequence; a row is what errors call an example."""
    numbered = [(number, example) for number, row in enumerate(rows, 1) for example in row]
    sequences = [
        sequence
        for chunk in _chunks(numbered)
        for sequence in _encode_answers(chunk, tokenizer, max_length, eos)
    ]
    return Dataset(
        tokens=_flat([ids[:max_length] for ids, _ in sequences]),
        offsets=offsets_of([min(len(ids), max_length) for ids, _ in sequences]),
        groups=offsets_of([len(row) for row in rows]),
        truncated=torch.tensor([len(ids) > max_length for ids, _ in sequences], dtype=torch.bool),
        prompt_lengths=torch.tensor([length for _, length in sequences], dtype=torch.int32),
    )


def _encode_answers(
    numbered: Sequence[tuple[int, Example]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    eos: list[int],
) -> Iterator[tuple[list[int], int]]:
    """The tokens of each example, not yet cut, and how many of them are the prompt's."""
    start_tokens = _start_tokens(tokenizer)
    texts = [_render(example.prompt, tokenizer, number) for number, example in numbered]
    prompts = _tokenize(texts, tokenizer)
    wholes = _tokenize([t + e.target for t, (_, e) in zip(texts, numbered, strict=True)], tokenizer)
    for (number, example), prompt, whole in zip(numbered, prompts, wholes, strict=True):
        answer = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            (answer,) = _tokenize([example.target], tokenizer)
        begun = _begun(example.prompt, prompt, tokenizer, start_tokens, number)
        if len(begun) >= max_length:
            raise ValueError(
                f"Example {number} has a prompt of {len(begun)} tokens, which leaves no room for "
                f"an answer within the max_length of {max_length}: raise --max_length, or shorten "
                f"or remove the example."
            )
        if not (answer or eos):
            raise ValueError(
                f"Example {number} has the candidate {example.target!r}, which the tokenizer makes "
                "no tokens of, so it has no likelihood: write it out."
            )
        yield [*begun, *answer, *eos], len(begun)


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before any text (mostly bos, or none)."""
    probe = "a"
    (plain,) = _tokenize([probe], tokenizer)
    full: list[int] = tokenizer(probe)["input_ids"]
    num_added = len(full) - len(plain)
    return next(full[:n] for n in range(num_added + 1) if full[n : n + len(plain)] == plain)


def _render(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    if isinstance(prompt, str):
        return prompt
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
    return text


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, without special tokens and without a limit on the length."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _begun(
    prompt: Prompt,
    ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    start_tokens: list[int],
    number: int,
) -> list[int]:
    """A prompt's tokens with a start, so that the first answer token has one to follow."""
    start = start_tokens if isinstance(prompt, str) else []  # a template writes its own
    if start or ids:
        return start + ids
    if tokenizer.bos_token_id is None:
        raise ValueError(
            f"Example {number} has an empty prompt and the tokenizer has no bos token to stand for "
            f"it: give the example a prompt."
        )
    return [tokenizer.bos_token_id]


def _encode_pairs(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[tuple[dict[str, list[int]], bool]]:
    """What the tokenizer makes of each pair, and whether it was cut: the few that are too long."""
    for chunk in _chunks(pairs):
        texts = [list(side) for side in zip(*chunk, strict=True)]
        has_second = texts[1][0] is not None  # all pairs of a task are alike
        rows: Any = tokenizer(*texts[: 1 + has_second], verbose=False)
        for i, pair in enumerate(chunk):
            if len(rows["input_ids"][i]) > max_length:
                yield _cut(pair, tokenizer, max_length), True
            else:
                yield {key: values[i] for key, values in rows.items()}, False


def _cut(pair: Pair, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]]:
    """A pair whose longer text is cut so that `max_length` tokens are left."""
    num_special = tokenizer.num_special_tokens_to_add(pair=pair[1] is not None)
    if num_special >= max_length:
        raise ValueError(
            f"The tokenizer puts {num_special} special tokens around a pair, which leaves no room "
            f"for text within the max_length of {max_length}: raise --max_length."
        )
    row: Any = tokenizer(*pair, truncation="longest_first", max_length=max_length)
    return dict(row)
