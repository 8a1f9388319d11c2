"""ONE dataset for all kinds of answers: token sequences of different lengths, end to end.

    tokens  | a a a | b b | c c c c | d d |         offsets  0 3 5 9 11     sequences
    rows    |   0         |   1           |         groups   0 2 4          what a batch counts

A row is an example of one sequence, an example with a sequence for each candidate, or with packing
several examples, whose sequences then lie in one row of the batch. The examples are text, choices
or numbers (`gem_ds.data.encode` makes them); what is not of their kind is None.

Labels stand on the answer tokens only and are not shifted: the loss compares `logits[:, :-1]` with
`labels[:, 1:]`. Where a conversation has several answers, what lies between them is `unlearnt`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

IGNORED_LABEL = -100  # what cross_entropy leaves out


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Sequence s is `tokens[offsets[s] : offsets[s + 1]]`; row i has those from `groups[i]` on."""

    tokens: Tensor  # int32 [sum of lengths]
    offsets: Tensor  # int64 [S + 1], rising from 0
    groups: Tensor  # int64 [n + 1]; the sequences of row i are `groups[i]` to `groups[i + 1]`
    truncated: Tensor  # bool [S], whether a part of the text was cut off
    #: int32 [S], each at least 1 and below the sequence's length; None where no token is learnt.
    prompt_lengths: Tensor | None = None
    #: bool [sum of lengths], which tokens behind a prompt are no answer's; None where all are.
    unlearnt: Tensor | None = None
    #: int32 [sum of lengths], which of two texts each token is of, where the model reads that.
    types: Tensor | None = None
    #: [n]; int64 index of a label or candidate, or fp32 the number; None where it is written.
    answers: Tensor | None = None
    is_packed: bool = False  # whether the sequences of a row share one row of the batch

    def __len__(self) -> int:
        return len(self.groups) - 1

    @property
    def num_truncated(self) -> int:
        """How many rows lost a part of their text to the limit on the length."""
        before = offsets_of(self.truncated.long())
        return int((before[self.groups].diff() > 0).sum())

    @property
    def largest_token(self) -> int:
        """The largest token id; -1 if there are no rows."""
        return int(self.tokens.max()) if len(self.tokens) else -1

    @property
    def longest(self) -> int:
        """Tokens of the longest row of a batch; 0 if there are none."""
        lengths = self.lengths if self.is_packed else self.offsets.diff()
        return int(lengths.max()) if len(lengths) else 0

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each row, padding left out, a prompt counted with each candidate: int64 [n].

        It is so counted wherever candidates share what they begin with, too.
        """
        return self.offsets[self.groups].diff()

    @property
    def widths(self) -> Tensor:
        """Tokens of each row's longest sequence, to which its batch is padded: int64 [n]."""
        longest = self.groups.new_zeros(len(self))
        rows = torch.arange(len(self)).repeat_interleave(self.groups.diff())
        return longest.scatter_reduce_(0, rows, self.offsets.diff(), "amax")

    def num_items(self, indices: Sequence[int]) -> int:
        """What the loss summed over these rows is divided by: answer tokens, or examples."""
        if self.answers is not None:
            return len(indices)
        assert self.prompt_lengths is not None, "without answers an answer is written"
        sequences = positions(self.groups, _index(indices))
        num_answer = _lengths(self.offsets, sequences) - self.prompt_lengths[sequences]
        if self.unlearnt is None:
            return int(num_answer.sum())
        return int(num_answer.sum() - self.unlearnt[positions(self.offsets, sequences)].sum())

    def select(self, indices: Sequence[int]) -> Self:
        """The dataset of these rows, in their order."""
        index = _index(indices)
        sequences = positions(self.groups, index)
        entries = positions(self.offsets, sequences)
        return replace(
            self,
            tokens=self.tokens[entries],
            offsets=offsets_of(_lengths(self.offsets, sequences)),
            groups=offsets_of(_lengths(self.groups, index)),
            truncated=self.truncated[sequences],
            prompt_lengths=None if self.prompt_lengths is None else self.prompt_lengths[sequences],
            unlearnt=None if self.unlearnt is None else self.unlearnt[entries],
            types=None if self.types is None else self.types[entries],
            answers=None if self.answers is None else self.answers[index],
        )

    def fingerprint(self) -> str:
        """A hash of all that a model reads and learns, so that a resume can refuse other data."""
        texts = [self.offsets, self.prompt_lengths, self.tokens, self.types, self.unlearnt]
        rows = [self.groups, self.answers] if self.answers is not None or self.is_packed else []
        if self.prompt_lengths is None:
            return _digest(*texts, *rows)
        return _digest(*texts) + (_digest(*rows) if rows else "")

    def collate(self, indices: Sequence[int], pad_token_id: int) -> dict[str, Tensor]:
        """These rows as a batch of B sequences, padded on the right to the longest, T.

        Packed rows carry no attention mask. Their position ids start at 0 for each example, and
        again for the padding; transformers reads the borders from these restarts and keeps
        attention within an example (`masking_utils.find_packed_sequence_indices`). Flash attention
        looks for the borders only where B is 1, and mixes the examples of longer batches.

        No rows give one sequence of padding, without labels or answers: the model runs, and the
        summed loss is 0.

        Returns:
            CPU tensors, int64 [B, T]: `input_ids`, and `position_ids` if packed, else
            `attention_mask`. Where text is learnt, `labels` (-100 outside the answers) and their
            `answer_positions`; where a model reads it, `token_type_ids`. Where an answer is one of
            n, `candidates` (`rows_of_groups`) and `answers` [n]; where candidates are compared,
            what `_collate_candidates` makes of them.
        """
        rows = self.select(indices)
        if rows.answers is not None and rows.prompt_lengths is not None:
            return rows._collate_candidates(pad_token_id)
        lengths = rows.offsets.diff()
        widths = rows.lengths if self.is_packed else lengths
        widths = widths if len(widths) else torch.zeros(1, dtype=torch.int64)
        columns = torch.arange(max(2, int(widths.max())))
        is_token = columns < widths[:, None]
        tokens = rows.tokens.long()
        within = torch.arange(len(tokens)) - rows.offsets[:-1].repeat_interleave(lengths)
        batch = {"input_ids": _filled(pad_token_id, is_token, tokens)}
        if rows.prompt_lengths is not None:
            is_answer = within >= rows.prompt_lengths.repeat_interleave(lengths)
            if rows.unlearnt is not None:
                is_answer &= ~rows.unlearnt
            labels = tokens.masked_fill(~is_answer, IGNORED_LABEL)
            batch["labels"] = _filled(IGNORED_LABEL, is_token, labels)
            batch["answer_positions"] = answer_positions(batch["labels"])
        if rows.types is not None:
            batch["token_type_ids"] = _filled(0, is_token, rows.types.long())
        if self.is_packed:
            batch["position_ids"] = (columns - widths[:, None]).masked_scatter(is_token, within)
        else:  # attention over nothing is undefined
            batch["attention_mask"] = (is_token if len(rows) else ~is_token).long()
        if rows.answers is not None:
            batch["candidates"] = rows_of_groups(rows.groups.diff())
            batch["answers"] = rows.answers
        return batch

    def _collate_candidates(self, pad_token_id: int) -> dict[str, Tensor]:
        """All rows as a batch in which candidates share a sequence where one begins another.

        A causal model need not read the last token of a candidate, and reads what is before the
        same whatever follows: those of one token after the same prompt are one sequence.

        Returns:
            CPU tensors, int64: `input_ids` and `attention_mask` [B, T] of what is read;
            `answer_positions`, flat and ascending, that tokens of candidates are predicted at; of
            these tokens, one candidate after another, `answer_tokens` [a] and at which of the
            positions, `answer_rows` [a]; `candidate_tokens` [S, L], which of them each candidate
            has, `candidates` [n, C], which of these each row (`rows_of_groups`), and `answers` [n].
        """
        assert self.prompt_lengths is not None
        assert self.answers is not None
        assert self.unlearnt is None, "all tokens of a candidate are compared"
        lengths, prompts = self.offsets.diff(), self.prompt_lengths.long()
        texts = [piece[:-1].tolist() for piece in self.tokens.split(lengths.tolist())]
        readers = [i for group in pairwise(self.groups.tolist()) for i in _readers(texts, *group)]
        kept = sorted(set(readers))
        widths = torch.tensor([len(texts[i]) for i in kept] or [0])
        columns = torch.arange(max(2, int(widths.max())))
        is_token = columns < widths[:, None]
        tokens = flat([texts[i] for i in kept]).long()
        counts = lengths - prompts  # of each candidate's tokens, which begin at its prompt's end
        within = torch.arange(int(counts.sum())) - offsets_of(counts)[:-1].repeat_interleave(counts)
        firsts = (self.offsets[:-1] + prompts).repeat_interleave(counts)
        row_of = {i: row for row, i in enumerate(kept)}
        rows = torch.tensor([row_of[i] for i in readers], dtype=torch.int64)
        places = (rows * len(columns) + prompts - 1).repeat_interleave(counts) + within
        answer_positions, answer_rows = places.unique(return_inverse=True)
        return {
            "input_ids": _filled(pad_token_id, is_token, tokens),
            "attention_mask": (is_token if kept else ~is_token).long(),
            "answer_tokens": self.tokens[firsts + within].long(),
            "answer_positions": answer_positions,
            "answer_rows": answer_rows,
            "candidate_tokens": rows_of_groups(counts),
            "candidates": rows_of_groups(self.groups.diff()),
            "answers": self.answers,
        }


def _readers(texts: Sequence[list[int]], start: int, stop: int) -> list[int]:
    """For each text from ``start`` to ``stop`` the one of them that is read for it: it begins so.

    As few different ones as can be. Sorted, a text stands right before those that begin with it.
    """
    group = range(start, stop)
    readers, kept = dict[int, int](), start
    for i in sorted(group, key=texts.__getitem__, reverse=True):
        if texts[kept][: len(texts[i])] != texts[i]:
            kept = i
        readers[i] = kept
    return [readers[i] for i in group]


def answer_positions(labels: Tensor) -> Tensor:
    """Where the next token of `labels` [B, T] is an answer's: int64 [n], flat and ascending.

    Found while the labels are on the CPU: a GPU would have to stop and tell how many there are.
    """
    rows, columns = torch.nonzero(labels[:, 1:] != IGNORED_LABEL, as_tuple=True)
    return rows * labels.shape[1] + columns


def rows_of_groups(counts: Tensor) -> Tensor:
    """The rows of each group, if groups of `counts` [n] rows follow each other.

    int64 [n, C] for the largest count C (at least 1), -1 where a group has fewer.
    """
    columns = torch.arange(max([1, *counts.tolist()]))
    rows = offsets_of(counts)[:-1, None] + columns
    return rows.masked_fill(columns >= counts[:, None], -1)


def flat(rows: Sequence[list[int]]) -> Tensor:
    """Token ids of all rows, end to end: int32."""
    pieces = [torch.tensor(row, dtype=torch.int32) for row in rows]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)


def offsets_of(lengths: Sequence[int] | Tensor) -> Tensor:
    """Where each of the lists that lie end to end begins, and the last one ends: int64 [n + 1]."""
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def positions(offsets: Tensor, index: Tensor) -> Tensor:
    """Where the entries of the lists `index` [k] lie, list after list: int64 [sum].

    Equivalent: `torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in index])`.
    """
    lengths = _lengths(offsets, index)
    shifts = offsets[index] - offsets_of(lengths)[:-1]
    return torch.arange(int(lengths.sum())) + shifts.repeat_interleave(lengths)


def _lengths(offsets: Tensor, index: Tensor) -> Tensor:
    """Entries of the lists `index` [k]: int64 [k]."""
    return offsets[index + 1] - offsets[index]


def _index(indices: Sequence[int]) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64)


def _filled(padding: int, is_token: Tensor, values: Tensor) -> Tensor:
    """int64 [B, T] with the values where tokens are, row after row."""
    return torch.full(is_token.shape, padding).masked_scatter(is_token, values)


def _digest(*tensors: Tensor | None) -> str:
    """SHA-256 of tensors, their lengths and their dtypes' bytes, on any machine the same."""
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            array = tensor.numpy()
            found.update(len(array).to_bytes(8, "little"))
            found.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return found.hexdigest()
