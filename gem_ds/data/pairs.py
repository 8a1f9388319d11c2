"""Sentence pairs for encoders, and what their classification head learns and predicts.

    labels     one pair; the head gives a score to each label        cross-entropy
    choices    a pair for each candidate; the head scores the pair   cross-entropy over candidates
    number     one pair; the head gives the number                   squared error

All losses are summed over examples. Pairs are encoded as the tokenizer does it by itself; one that
is too long loses tokens at the end of the longer text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gem_ds.data.choices import best_choice, in_groups, rows_of_groups, summed_choice_loss
from gem_ds.data.ragged import digest, offsets_of, positions
from gem_ds.data.tasks import ChoiceExample, Example, NumberExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TYPES = "token_type_ids"
_CHUNK_SIZE = 1000  # pairs per tokenizer call


@dataclass(frozen=True, kw_only=True, eq=False)
class PairDataset:
    """Encoded pairs, end to end in one tensor: pair j is `tokens[offsets[j]:offsets[j + 1]]`.

    Attributes:
        tokens: int32 [sum of lengths], the token ids.
        types: int32 [sum of lengths], which of the two texts each is of; None where the model does
            not read that.
        offsets: int64 [S + 1].
        groups: int64 [n + 1]; the pairs of example i are `groups[i]` to `groups[i + 1]`.
        truncated: bool [S], whether a pair was cut.
        answers: [n]; int64 index of a label or candidate, or fp32 the number.
    """

    tokens: Tensor
    types: Tensor | None
    offsets: Tensor
    groups: Tensor
    truncated: Tensor
    answers: Tensor

    @classmethod
    def encode(
        cls, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> PairDataset:
        """Encode every pair of every example.

        Raises:
            ValueError: `max_length` leaves no room beside the tokenizer's special tokens.
        """
        pairs: list[tuple[str, str | None]] = []
        counts: list[int] = []
        answers: list[float] = []
        for example in examples:
            assert isinstance(example, ChoiceExample | NumberExample)
            pairs += example.pairs
            counts.append(len(example.pairs))
            answers.append(example.value if isinstance(example, NumberExample) else example.answer)
        is_number = any(isinstance(example, NumberExample) for example in examples)
        encoded = list(_encode(pairs, tokenizer, max_length))
        has_types = _TYPES in tokenizer.model_input_names
        return cls(
            tokens=_flat([pair.input_ids for pair in encoded]),
            types=_flat([pair.token_type_ids for pair in encoded]) if has_types else None,
            offsets=offsets_of([len(pair.input_ids) for pair in encoded]),
            groups=offsets_of(counts),
            truncated=torch.tensor([pair.is_truncated for pair in encoded], dtype=torch.bool),
            answers=torch.tensor(answers, dtype=torch.float32 if is_number else torch.int64),
        )

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def num_truncated(self) -> int:
        """How many examples lost a part of a pair to max_length."""
        before = offsets_of(self.truncated.long())
        return int((before[self.groups].diff() > 0).sum())

    @property
    def largest_token(self) -> int:
        """The largest token id; -1 if there are no examples."""
        return int(self.tokens.max()) if len(self.tokens) else -1

    @property
    def longest(self) -> int:
        """Tokens of the longest pair; 0 if there are none."""
        return int(self.offsets.diff().max()) if len(self.tokens) else 0

    def select(self, indices: Sequence[int]) -> PairDataset:
        """The dataset of `indices`, in their order."""
        index = torch.tensor(indices, dtype=torch.int64)
        pairs = positions(self.groups, index)
        entries = positions(self.offsets, pairs)
        return PairDataset(
            tokens=self.tokens[entries],
            types=None if self.types is None else self.types[entries],
            offsets=offsets_of(self.offsets.diff()[pairs]),
            groups=offsets_of(self.groups.diff()[index]),
            truncated=self.truncated[pairs],
            answers=self.answers[index],
        )

    def fingerprint(self) -> str:
        """A hash of tokens, types, which pairs are one example's, and answers."""
        types = [] if self.types is None else [self.types]
        return digest(self.offsets, self.tokens, *types, self.groups, self.answers)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of all pairs of each example: int64 [n]."""
        return self.offsets[self.groups].diff()

    def weight(self, indices: Sequence[int]) -> int:
        """The number of examples."""
        return len(indices)

    def collate(self, indices: Sequence[int], pad_token_id: int) -> dict[str, Tensor]:
        """Lay out n examples with S pairs together, padded on the right to the longest, T.

        No examples give one sequence of padding and no answers: a batch of weight zero.

        Returns:
            CPU tensors: int64 `input_ids`, `attention_mask` and (where the model reads them)
            `token_type_ids` [S, T], int64 `candidates` [n, C] (`rows_of_groups`), `answers` [n].
        """
        index = torch.tensor(indices, dtype=torch.int64)
        pairs = positions(self.groups, index)
        lengths = self.offsets.diff()[pairs]
        shape = (max(1, len(pairs)), max(2, int(lengths.max()) if len(pairs) else 0))
        is_token = torch.arange(shape[1]) < (lengths[:, None] if len(pairs) else shape[1])
        entries = positions(self.offsets, pairs)
        batch = {
            "input_ids": torch.full(shape, pad_token_id),
            "attention_mask": is_token.long().view(shape),
        }
        if self.types is not None:
            batch[_TYPES] = torch.zeros(shape, dtype=torch.int64)
        if len(pairs):
            batch["input_ids"][is_token] = self.tokens[entries].long()
            if self.types is not None:
                batch[_TYPES][is_token] = self.types[entries].long()
        candidates = rows_of_groups(self.groups.diff()[index])
        return batch | {"candidates": candidates, "answers": self.answers[index]}


def summed_pair_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of a batch of `PairDataset`, summed over its examples; fp32 scalar."""
    outputs, answers = _outputs(model, batch), batch["answers"]
    if answers.is_floating_point():
        return (outputs[:, 0] - answers).square().sum()
    return summed_choice_loss(outputs, answers)


def predict_pairs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The best label or candidate of each example (int64 [n], as `best_choice`), or the number."""
    outputs = _outputs(model, batch)
    return outputs[:, 0] if batch["answers"].is_floating_point() else best_choice(outputs)


def _outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """fp32 [n, labels], [n, candidates], or [n, 1] the number."""
    inputs = {key: value for key, value in batch.items() if key not in ("candidates", "answers")}
    logits = model(**inputs).logits.float()
    candidates = batch["candidates"]
    if logits.shape[1] > 1:  # the head scores labels, of one pair each
        return logits[candidates[:, 0]]
    return in_groups(logits[:, 0], candidates)


class _EncodedPair(NamedTuple):
    input_ids: list[int]
    token_type_ids: list[int]
    is_truncated: bool


def _encode(
    pairs: Sequence[tuple[str, str | None]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[_EncodedPair]:
    """Encode pairs; the few that are too long a second time, with truncation."""
    for first in range(0, len(pairs), _CHUNK_SIZE):
        chunk = pairs[first : first + _CHUNK_SIZE]
        texts = [list(side) for side in zip(*chunk, strict=True)]
        has_second = texts[1][0] is not None  # all pairs of a task are alike
        rows: Any = tokenizer(*texts[: 1 + has_second], verbose=False)
        for i, pair in enumerate(chunk):
            is_long = len(rows["input_ids"][i]) > max_length
            row = {key: values[i] for key, values in rows.items()}
            if is_long:
                row = _cut(pair, tokenizer, max_length)
            yield _EncodedPair(row["input_ids"], row.get(_TYPES, []), is_long)


def _cut(
    pair: tuple[str, str | None], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[int]]:
    """A pair whose longer text is cut so that `max_length` tokens are left."""
    num_special = tokenizer.num_special_tokens_to_add(pair=pair[1] is not None)
    if num_special >= max_length:
        raise ValueError(
            f"The tokenizer puts {num_special} special tokens around a pair, which leaves no room "
            f"for text within the max_length of {max_length}: raise --max_length."
        )
    row: Any = tokenizer(*pair, truncation="longest_first", max_length=max_length)
    return dict(row)


def _flat(rows: Sequence[list[int]]) -> Tensor:
    pieces = [torch.tensor(row, dtype=torch.int32) for row in rows]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)
