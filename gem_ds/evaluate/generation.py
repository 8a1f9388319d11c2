"""What a generator is asked for and gives back, from prompts to batches of requests.

    prompts -> tokens -> requests -> batches of similar length -> completions

A prompt's tokens are those of training (`gem_ds.data.encode`). Batches are the same whatever has
been sampled already and on any number of ranks, so that a continued run rounds alike.

The noise of sampling is drawn from a request's key (task id, number of the sample):

    u = hash(seed, task id, sample number, position) in (0, 1)

No generator has a state, so a request is answered alike in whatever batch, order, process or
continued run it comes. What is left are the logits: a batch pads its rows, and kernels then round
differently. In fp32 one token in a million may flip, and with it the rest of its sample; in bf16
more do, and each sample remains a fair draw (measured by `benchmarks/sampling_batches.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import groupby

import torch
from transformers import PreTrainedTokenizerBase

from gem_ds.data.chat import end_of_turn
from gem_ds.data.encode import encode_prompt
from gem_ds.data.tasks import Example, Prompt
from gem_ds.flags import refuse_below_one
from gem_ds.models.encoders import num_positions
from gem_ds.models.load import ModelFiles
from gem_ds.models.tokenizer import refuse_foreign_tokens

Key = tuple[str, int]
"""Which sample: the task id and the sample's number."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How completions are made, apart from what must not change them (the batch size).

    Temperature divides the logits, 0 is greedy; tokens are drawn from the fewest most likely ones
    that have the share top_p together.
    """

    max_new_tokens: int
    stop_strings: tuple[str, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        assert all(self.stop_strings), "an empty stop string would end everything at once"
        refuse_below_one(max_new_tokens=self.max_new_tokens)
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"--temperature must be a finite number of at least 0, not {self.temperature}."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must be above 0 and at most 1, not {self.top_p}.")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, so that there is one completion of a prompt."""
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion that is wanted: after these tokens, of at most `limit` ones."""

    key: Key
    prompt_ids: list[int]
    limit: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the model wrote after a prompt."""

    text: str  # continues the prompt's exactly, a leading space too; no stop, no special tokens
    num_tokens: int
    finish_reason: str  # "eos", "stop" (a stop string) or "length"


def make_requests(
    files: ModelFiles, prompts: Mapping[str, Prompt], keys: Iterable[Key], max_new_tokens: int
) -> list[Request]:
    """Encode prompts, by task id; near the end of the model's positions completions are cut."""
    positions, vocab_size = num_positions(files.config), files.config.get_text_config().vocab_size
    prompt_ids, limits = {}, {}
    for task_id, prompt in prompts.items():
        prompt_ids[task_id] = ids = encode_prompt(prompt, files.tokenizer)
        room = max_new_tokens if positions is None else positions - len(ids)
        if room < 1:
            raise ValueError(
                f"The prompt of {task_id} has {len(ids)} tokens, which leaves no room for an answer"
                f" in the model's {positions} positions: use a model that reads more, or fewer "
                "shots."
            )
        refuse_foreign_tokens(max(ids), vocab_size)
        limits[task_id] = min(max_new_tokens, room)
    return [Request(key=key, prompt_ids=prompt_ids[key[0]], limit=limits[key[0]]) for key in keys]


def ending_turns(
    settings: GenerationSettings, prompts: Iterable[Prompt], tokenizer: PreTrainedTokenizerBase
) -> GenerationSettings:
    """The settings, with the chat template's end of a turn as a stop where prompts are messages.

    It is where training on that template ends an answer, and may be no eos token of the model.
    """
    if (chat := next((p for p in prompts if not isinstance(p, str)), None)) is None:
        return settings
    end = end_of_turn(Example(prompt=chat, target=""), tokenizer, "A prompt").strip()
    if not end or end in settings.stop_strings:
        return settings
    return replace(settings, stop_strings=(*settings.stop_strings, end))


def make_batches(requests: Sequence[Request], batch_size: int) -> list[list[list[Request]]]:
    """Groups of batches, longest prompts first; within a group all have one limit.

    So no row, and no rank, runs past the end of the model's positions while another is at work.
    """
    ordered = sorted(requests, key=lambda request: -len(request.prompt_ids))
    groups = [list(group) for _, group in groupby(ordered, key=lambda request: request.limit)]
    return [
        [group[first : first + batch_size] for first in range(0, len(group), batch_size)]
        for group in groups
    ]


def uniform(seed: int, key: Key, position: int) -> float:
    """A number in (0, 1) for the token at a position of a sample, whenever it is asked for."""
    return (_bits(seed, *key, position) >> 12) * 2.0**-52 + 2.0**-53


def sample_seed(seed: int, key: Key) -> int:
    """A seed in [0, 2^63) for a generator that is not this file's, one per sample."""
    return _bits(seed, *key) >> 1


def _bits(*parts: int | str) -> int:
    """64 bits that depend on every part."""
    return int.from_bytes(blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "big")


@contextmanager
def sparing_memory(batch: str) -> Iterator[None]:
    """Turns running out of memory over a batch, which is described, into a ValueError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"The device's memory does not hold a batch of {batch}: lower --batch_size."
        ) from error
