"""Sentence pairs -> tokens, for an encoder's head: one pair, or one for each candidate.

Pairs are encoded as the tokenizer does it by itself; one that is too long loses tokens at the end
of the longer text.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from gem_ds.data.dataset import Dataset, flat, offsets_of
from gem_ds.data.tasks import ChoiceExample, Example, NumberExample, Pair

_TYPES = "token_type_ids"
_CHUNK_SIZE = 1000  # pairs per tokenizer call: enough to keep a fast tokenizer's threads busy


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
        tokens=flat([row["input_ids"] for row, _ in encoded]),
        types=flat([row[_TYPES] for row, _ in encoded]) if has_types else None,
        offsets=offsets_of([len(row["input_ids"]) for row, _ in encoded]),
        groups=offsets_of([len(example.pairs) for example in asked]),
        truncated=torch.tensor([is_cut for _, is_cut in encoded], dtype=torch.bool),
        answers=torch.tensor(answers, dtype=torch.float32 if is_number else torch.int64),
    )


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
