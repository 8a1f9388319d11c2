"""Examples whose answer is one of several candidates, for causal models: which is the likeliest?

    score(c) = 1/|c| * sum_t log p(c_t | prompt, c_<t)        c_t: the |c| tokens of a candidate
    prediction = argmax over c of score(c), ties to the first
    loss       = -log softmax(score)[right candidate]         (--classification_loss candidates)

Candidates are tokenized as `data.encode` does it, but without an eos: what follows an answer is
no part of it, and a token that all candidates share would weigh most in the shortest one.

All candidates of an example stand in the same micro-batch, each in a sequence of its own, so a
micro-batch of B examples is a forward pass of B times the number of candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gem_ds.data.encode import encode_all
from gem_ds.data.ragged import digest, offsets_of, positions
from gem_ds.data.tasks import ChoiceExample, Example
from gem_ds.data.texts import IGNORED_LABEL, EncodedDataset
from gem_ds.models.loss import answer_labels, answer_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, eq=False)
class ChoiceDataset:
    """Examples with all their candidates.

    Attributes:
        sequences: Prompt and candidate, one after another for each candidate of each example.
        offsets: int64 [n + 1]; the sequences of example i are `offsets[i]` to `offsets[i + 1]`.
        answers: int64 [n], the right candidates.
    """

    sequences: EncodedDataset
    offsets: Tensor
    answers: Tensor

    @classmethod
    def encode(
        cls, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> ChoiceDataset:
        """Encode every candidate of every example.

        Raises:
            ValueError: As `data.encode.encode`, or a candidate has no tokens; the sentence names
                the example, counted from 1.
        """
        texts, numbers, counts, answers = [], [], [], []
        for number, example in enumerate(examples, start=1):
            assert isinstance(example, ChoiceExample)
            texts += [Example(prompt=example.prompt, target=c) for c in example.candidates]
            numbers += [number] * len(example.candidates)
            counts.append(len(example.candidates))
            answers.append(example.answer)
        encoded = encode_all(texts, tokenizer, max_length, has_eos=False, numbers=numbers)
        return cls(
            sequences=EncodedDataset.of(list(encoded)),
            offsets=offsets_of(counts),
            answers=torch.tensor(answers, dtype=torch.int64),
        )

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def num_truncated(self) -> int:
        """How many examples lost the end of a candidate to max_length."""
        before = offsets_of(self.sequences.truncated.long())
        return int((before[self.offsets].diff() > 0).sum())

    @property
    def largest_token(self) -> int:
        """The largest token id; -1 if there are no examples."""
        return self.sequences.largest_token

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; 0 if there are none."""
        return self.sequences.longest

    def select(self, indices: Sequence[int]) -> ChoiceDataset:
        """The dataset of `indices`, in their order."""
        index = torch.tensor(indices, dtype=torch.int64)
        return ChoiceDataset(
            sequences=self.sequences.select(self._sequences_of(indices)),
            offsets=offsets_of(self.offsets.diff()[index]),
            answers=self.answers[index],
        )

    def fingerprint(self) -> str:
        """A hash of the sequences, of which are one example's, and of the answers."""
        return self.sequences.fingerprint() + digest(self.offsets, self.answers)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of all candidates of each example, the prompt counted with each: int64 [n]."""
        return self.sequences.offsets[self.offsets].diff()

    def weight(self, indices: Sequence[int]) -> int:
        """The number of examples."""
        return len(indices)

    def collate(self, indices: Sequence[int], pad_token_id: int) -> dict[str, Tensor]:
        """Lay out n examples with S candidates together.

        Returns:
            What `EncodedDataset.collate` gives of S sequences, and int64 `answers` [n] and
            `candidates` [n, C], as `rows_of_groups` has them.
        """
        index = torch.tensor(indices, dtype=torch.int64)
        return self.sequences.collate(self._sequences_of(indices), pad_token_id) | {
            "candidates": rows_of_groups(self.offsets.diff()[index]),
            "answers": self.answers[index],
        }

    def _sequences_of(self, indices: Sequence[int]) -> list[int]:
        return positions(self.offsets, torch.tensor(indices, dtype=torch.int64)).tolist()


def rows_of_groups(counts: Tensor) -> Tensor:
    """Which rows belong to each group, if groups of `counts` [n] rows follow each other.

    Returns:
        int64 [n, C] for the largest count C (at least 1): row numbers, -1 where a group has fewer.
    """
    columns = torch.arange(max(1, int(counts.max()))) if len(counts) else torch.arange(1)
    rows = offsets_of(counts)[:-1, None] + columns
    return rows.masked_fill(columns >= counts[:, None], -1)


def in_groups(scores: Tensor, candidates: Tensor) -> Tensor:
    """Scores [S] of rows as [n, C] of groups (`rows_of_groups`), -inf where there is no row."""
    return scores[candidates.clamp(min=0)].masked_fill(candidates < 0, -torch.inf)


def summed_choice_loss(scores: Tensor, answers: Tensor) -> Tensor:
    """Cross-entropy of scores [n, C] (fp32, -inf where there is no candidate), summed over n."""
    return F.cross_entropy(scores, answers, reduction="sum")


def best_choice(scores: Tensor) -> Tensor:
    """Index of the largest of each row's scores [n, C], the first of several: int64 [n].

    -1 where a score is NaN, so that nothing is best.
    """
    return scores.argmax(dim=1).masked_fill(scores.isnan().any(dim=1), -1)


def mean_log_likelihoods(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean log-likelihood of each sequence's labelled tokens: fp32 [S]; 0 where there are none."""
    positions, labels = batch["answer_positions"], batch["labels"]
    texts = {key: batch[key] for key in ("input_ids", "attention_mask", "answer_positions")}
    logits = answer_logits(model, texts).float()
    losses = F.cross_entropy(logits, answer_labels(batch), reduction="none")
    by_token = losses.new_zeros(labels.numel()).index_copy(0, positions, losses).view(labels.shape)
    return -by_token.sum(dim=1) / (labels != IGNORED_LABEL).sum(dim=1).clamp(min=1)


def summed_candidate_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of a batch of `ChoiceDataset`, summed over its examples; fp32 scalar."""
    return summed_choice_loss(_scores(model, batch), batch["answers"])


def predict_candidates(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The likeliest candidate of each example: int64 [n], as `best_choice`."""
    return best_choice(_scores(model, batch))


def _scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return in_groups(mean_log_likelihoods(model, batch), batch["candidates"])
