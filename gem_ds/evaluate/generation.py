"""Prompts to batches of requests, and the model that answers them.

    prompts -> tokens -> requests -> batches of similar length -> completions

A prompt's tokens are those of training (`gem_ds.data.encode.encode_prompt`). Batches are the same
whatever has been sampled already and however many ranks there are, so that a continued run rounds
as an uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Protocol

from transformers import PreTrainedModel

from gem_ds.data.encode import encode_prompt
from gem_ds.evaluate.arguments import sparing_memory
from gem_ds.evaluate.completion import Completion, GenerationSettings, Request
from gem_ds.evaluate.decoding import decode_batch
from gem_ds.evaluate.samples import Key, Prompt
from gem_ds.models.encoders import num_positions
from gem_ds.models.load import ModelFiles
from gem_ds.models.tokenizer import refuse_foreign_tokens


class Backend(Protocol):
    """What answers requests."""

    #: Whether all ranks must answer a batch at the same time, since each holds a part of the model.
    synced_ranks: bool

    def batches(self, requests: Sequence[Request]) -> list[list[list[Request]]]:
        """Groups of batches; ranks may answer batches of one group at the same time."""

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer the requests of one batch, in their order."""


class Transformers:
    """A transformers model, whole on this rank or partitioned over all.

    Args:
        files: What the model was loaded from.
        model: In eval mode.
        settings: How completions are made.
        batch_size: Requests per batch.
        synced_ranks: Whether it is partitioned.
    """

    def __init__(
        self,
        files: ModelFiles,
        model: PreTrainedModel,
        settings: GenerationSettings,
        *,
        batch_size: int,
        synced_ranks: bool = False,
    ) -> None:
        self.synced_ranks = synced_ranks
        self._batch_size = batch_size
        self._files = files
        self._model = model
        self._settings = settings

    def batches(self, requests: Sequence[Request]) -> list[list[list[Request]]]:
        """As `make_batches`."""
        return make_batches(requests, self._batch_size)

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer the requests of one batch, in their order.

        Raises:
            ValueError: The memory does not suffice, or the logits are not finite.
        """
        longest = max(len(request.prompt_ids) + request.limit for request in requests)
        with sparing_memory(f"{len(requests)} samples of up to {longest} tokens"):
            return decode_batch(
                self._model,
                self._files.tokenizer,
                requests,
                self._settings,
                synced_ranks=self.synced_ranks,
            )


def make_requests(
    files: ModelFiles, prompts: Mapping[str, Prompt], keys: Iterable[Key], max_new_tokens: int
) -> list[Request]:
    """Encode prompts, and refuse those which the model cannot read; needs no weights.

    Args:
        files: Of the model.
        prompts: Task id to text, or to chat messages for the tokenizer's chat template.
        keys: Which samples are wanted.
        max_new_tokens: The longest completion; near the end of the model's positions it is cut.

    Raises:
        ValueError: A prompt fills the model's positions, has tokens which the model lacks, or
            cannot be encoded (`encode_prompt`).
    """
    prompt_ids = {
        task_id: encode_prompt(prompt, files.tokenizer) for task_id, prompt in prompts.items()
    }
    positions = num_positions(files.config)
    for task_id, ids in prompt_ids.items():
        _check_prompt(task_id, ids, positions, files.text_config.vocab_size)
    return [
        Request(
            task_id=task_id,
            sample=sample,
            prompt_ids=prompt_ids[task_id],
            limit=min(max_new_tokens, positions - len(prompt_ids[task_id]))
            if positions is not None
            else max_new_tokens,
        )
        for task_id, sample in keys
    ]


def make_batches(requests: Sequence[Request], batch_size: int) -> list[list[list[Request]]]:
    """Groups of batches, longest prompts first; within a group all have one limit.

    Limits differ only where prompts come near the end of the model's positions; there all prompts
    of a group have one length, so no row, and no rank, runs past the end while another is at work.
    """
    ordered = sorted(requests, key=lambda request: -len(request.prompt_ids))
    groups = [list(group) for _, group in groupby(ordered, key=lambda request: request.limit)]
    return [
        [group[first : first + batch_size] for first in range(0, len(group), batch_size)]
        for group in groups
    ]


def _check_prompt(task_id: str, ids: list[int], positions: int | None, vocab_size: int) -> None:
    if positions is not None and len(ids) >= positions:
        raise ValueError(
            f"The prompt of {task_id} has {len(ids)} tokens, which leaves no room for an answer in "
            f"the model's {positions} positions: use a model that reads more, or fewer shots."
        )
    refuse_foreign_tokens(max(ids), vocab_size)
