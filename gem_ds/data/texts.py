"""Examples whose answer is text: prompt and answer in one sequence, the loss on the answer.

Labels stand on the answer tokens only and are not shifted: the loss compares `logits[:, :-1]` with
`labels[:, 1:]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gem_ds.data.encode import Encoded, encode_all
from gem_ds.data.ragged import digest, offsets_of, positions
from gem_ds.data.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100  # what cross_entropy leaves out


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
        """Encode every example as `gem_ds.data.encode.encode` does.

        Raises:
            ValueError: As `encode`; the sentence names the example, counted from 1.
        """
        return cls.of(list(encode_all(examples, tokenizer, max_length)))

    @classmethod
    def of(cls, encoded: Sequence[Encoded]) -> EncodedDataset:
        """The dataset of examples that are encoded already."""
        pieces = [torch.tensor(example.input_ids, dtype=torch.int32) for example in encoded]
        return cls(
            tokens=torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32),
            offsets=offsets_of([len(example.input_ids) for example in encoded]),
            prompt_lengths=torch.tensor([e.prompt_length for e in encoded], dtype=torch.int32),
            truncated=torch.tensor([e.is_truncated for e in encoded], dtype=torch.bool),
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def num_truncated(self) -> int:
        """How many examples lost the end of their answer to max_length."""
        return int(self.truncated.sum())

    @property
    def largest_token(self) -> int:
        """The largest token id; -1 if there are no examples."""
        return int(self.tokens.max()) if len(self.tokens) else -1

    @property
    def longest(self) -> int:
        """Tokens of the longest example; 0 if there are none."""
        return int(self.offsets.diff().max()) if len(self) else 0

    def length(self, i: int) -> int:
        """Tokens of example `i`."""
        return int(self.offsets[i + 1] - self.offsets[i])

    def prompt_length(self, i: int) -> int:
        """Tokens of example `i` that are its prompt."""
        return int(self.prompt_lengths[i])

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each example: int64 [n]."""
        return self.offsets.diff()

    def weight(self, indices: Sequence[int]) -> int:
        """Tokens of these examples that carry loss: all but the prompts, which are never empty."""
        index = torch.tensor(indices, dtype=torch.int64)
        return int(self.lengths[index].sum() - self.prompt_lengths[index].sum())

    def input_ids(self, i: int) -> Tensor:
        """Token ids of example `i`: int32 [length], a view."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def select(self, indices: Sequence[int]) -> EncodedDataset:
        """The dataset of `indices`, in their order."""
        index = torch.tensor(indices, dtype=torch.int64)
        return EncodedDataset(
            tokens=self.tokens[positions(self.offsets, index)],
            offsets=offsets_of(self.offsets.diff()[index]),
            prompt_lengths=self.prompt_lengths[index],
            truncated=self.truncated[index],
        )

    def fingerprint(self) -> str:
        """SHA-256 of lengths, prompt lengths and tokens."""
        return digest(self.offsets, self.prompt_lengths, self.tokens)

    def collate(self, indices: Sequence[int], pad_token_id: int) -> dict[str, Tensor]:
        """As the function `collate`, one example a row."""
        return collate(self, [[i] for i in indices], pad_token_id, packed=False)


def collate(
    dataset: EncodedDataset, rows: Sequence[Sequence[int]], pad_token_id: int, packed: bool
) -> dict[str, Tensor]:
    """Lay rows out as a batch of B sequences, padded on the right to the longest, T.

    Packed rows carry no attention mask. Their position ids start at 0 for each example, and again
    for the padding; transformers reads the borders from these restarts and keeps attention within
    an example (`masking_utils.find_packed_sequence_indices`). Flash attention looks for the borders
    only where B is 1, and mixes the examples of longer batches.

    No rows at all give one sequence of padding without labels: a batch of weight zero.

    Returns:
        CPU tensors, int64 [B, T]: `input_ids`, `labels` (-100 outside the answers), and
        `position_ids` if packed, else `attention_mask`; and `answer_positions`.
    """
    assert packed or all(len(row) == 1 for row in rows), "without packing a row is one example"
    rows = rows or [[]]
    num_tokens = max(2, *(sum(dataset.length(i) for i in row) for row in rows))
    input_ids = torch.full((len(rows), num_tokens), pad_token_id)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    position_ids = torch.zeros_like(input_ids)
    attention_mask = torch.zeros_like(input_ids)
    for b, row in enumerate(rows):
        start = 0
        for i in row:
            answer, end = start + dataset.prompt_length(i), start + dataset.length(i)
            input_ids[b, start:end] = dataset.input_ids(i)
            labels[b, answer:end] = input_ids[b, answer:end]
            position_ids[b, start:end] = torch.arange(end - start)
            start = end
        position_ids[b, start:] = torch.arange(num_tokens - start)
        attention_mask[b, : start or num_tokens] = 1  # attention over nothing is undefined
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "answer_positions": answer_positions(labels),
    }
    if packed:
        return batch | {"position_ids": position_ids}
    return batch | {"attention_mask": attention_mask}


def answer_positions(labels: Tensor) -> Tensor:
    """Where the next token is an answer's: int64 [n], flat positions in [B, T], ascending.

    Found while the labels are on the CPU: a GPU would have to stop and tell how many there are.

    Args:
        labels: int64 [B, T], :data:`IGNORED_LABEL` outside the answers.
    """
    rows, columns = torch.nonzero(labels[:, 1:] != IGNORED_LABEL, as_tuple=True)
    return rows * labels.shape[1] + columns
