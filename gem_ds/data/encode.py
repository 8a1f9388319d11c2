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
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from gem_ds.data.dataset import Dataset, offsets_of
from gem_ds.data.tasks import ChoiceExample, Example, NumberExample, Pair

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
    numbers = range(1, len(examples) + 1)
    eos = [tokenizer.eos_token_id]
    sequences = list(_encode_answers(examples, tokenizer, max_length, eos, numbers))
    return _dataset([1] * len(examples), max_length, sequences)


def encode_candidates(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Encode `prompt tokens + candidate tokens` for every candidate of every example.

    Raises:
        ValueError: As `encode_texts` (no eos is needed), or a candidate has no tokens.
    """
    texts: list[Example] = []
    numbers: list[int] = []
    counts: list[int] = []
    answers: list[int] = []
    for number, example in enumerate(examples, start=1):
        assert isinstance(example, ChoiceExample)
        texts += [Example(prompt=example.prompt, target=c) for c in example.candidates]
        numbers += [number] * len(example.candidates)
        counts.append(len(example.candidates))
        answers.append(example.answer)
    sequences = list(_encode_answers(texts, tokenizer, max_length, [], numbers))
    return _dataset(counts, max_length, sequences, torch.tensor(answers, dtype=torch.int64))


def encode_pairs(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Encode every pair of every example.

    Raises:
        ValueError: `max_length` leaves no room beside the tokenizer's special tokens.
    """
    pairs: list[Pair] = []
    counts: list[int] = []
    answers: list[float] = []
    for example in examples:
        assert isinstance(example, ChoiceExample | NumberExample)
        pairs += example.pairs
        counts.append(len(example.pairs))
        answers.append(example.value if isinstance(example, NumberExample) else example.answer)
    is_number = any(isinstance(example, NumberExample) for example in examples)
    encoded = list(_encode_pairs(pairs, tokenizer, max_length))
    has_types = _TYPES in tokenizer.model_input_names
    return Dataset(
        tokens=_flat([row["input_ids"] for row, _ in encoded]),
        types=_flat([row[_TYPES] for row, _ in encoded]) if has_types else None,
        offsets=offsets_of([len(row["input_ids"]) for row, _ in encoded]),
        groups=offsets_of(counts),
        truncated=torch.tensor([is_cut for _, is_cut in encoded], dtype=torch.bool),
        answers=torch.tensor(answers, dtype=torch.float32 if is_number else torch.int64),
    )


def encode_prompt(
    prompt: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The token ids from which a generation starts: exactly the prompt part of `encode_texts`."""
    text, start = _render(prompt, tokenizer, _start_tokens(tokenizer), number=1)
    (ids,) = _tokenize([text], tokenizer)
    return _lead(start, ids, tokenizer, number=1) + ids


def _dataset(
    counts: list[int],
    max_length: int,
    sequences: list[tuple[list[int], int]],
    answers: Tensor | None = None,
) -> Dataset:
    """The dataset of sequences with the lengths of their prompts, `counts` of each example."""
    return Dataset(
        tokens=_flat([ids[:max_length] for ids, _ in sequences]),
        offsets=offsets_of([min(len(ids), max_length) for ids, _ in sequences]),
        groups=offsets_of(counts),
        truncated=torch.tensor([len(ids) > max_length for ids, _ in sequences], dtype=torch.bool),
        prompt_lengths=torch.tensor([length for _, length in sequences], dtype=torch.int32),
        answers=answers,
    )


def _flat(rows: Sequence[list[int]]) -> Tensor:
    pieces = [torch.tensor(row, dtype=torch.int32) for row in rows]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)


def _encode_answers(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    eos: list[int],
    numbers: Sequence[int],
) -> Iterator[tuple[list[int], int]]:
    """The tokens of each example, not yet cut, and how many of them are the prompt's.

    Two tokenizer calls encode a chunk. `numbers` are what errors call the examples.
    """
    start_tokens = _start_tokens(tokenizer)
    for first in range(0, len(examples), _CHUNK_SIZE):
        part = slice(first, first + _CHUNK_SIZE)
        chunk = list(zip(examples[part], numbers[part], strict=True))
        rendered = [
            _render(example.prompt, tokenizer, start_tokens, number) for example, number in chunk
        ]
        prompts = _tokenize([text for text, _ in rendered], tokenizer)
        wholes = _tokenize(
            [text + e.target for (text, _), (e, _) in zip(rendered, chunk, strict=True)], tokenizer
        )
        for i, (example, number) in enumerate(chunk):
            prompt, answer = prompts[i], wholes[i][len(prompts[i]) :]
            if wholes[i][: len(prompt)] != prompt:
                (answer,) = _tokenize([example.target], tokenizer)
            prompt = _lead(rendered[i][1], prompt, tokenizer, number) + prompt
            if len(prompt) >= max_length:
                raise ValueError(
                    f"Example {number} has a prompt of {len(prompt)} tokens, which leaves no room "
                    f"for an answer within the max_length of {max_length}: raise --max_length, or "
                    f"shorten or remove the example."
                )
            if not (answer or eos):
                raise ValueError(
                    f"Example {number} has the candidate {example.target!r}, which the tokenizer "
                    "makes no tokens of, so it has no likelihood: write it out."
                )
            yield [*prompt, *answer, *eos], len(prompt)


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before any text (mostly bos, or none)."""
    probe = "a"
    (plain,) = _tokenize([probe], tokenizer)
    full: list[int] = tokenizer(probe)["input_ids"]
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
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


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


def _encode_pairs(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[tuple[dict[str, list[int]], bool]]:
    """What the tokenizer makes of each pair, and whether it was cut: the few that are too long."""
    for first in range(0, len(pairs), _CHUNK_SIZE):
        chunk = pairs[first : first + _CHUNK_SIZE]
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
