"""What a generator is asked for and what it gives back. Plain values; no torch.

A request carries its key (task id, number of the sample), because the noise of sampling is drawn
from it (`evaluate.noise`): the same request is answered alike in whatever batch, order, process or
continued run it comes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How completions are made, apart from what must not change them (the batch size).

    Attributes:
        max_new_tokens: The longest completion, in tokens.
        stop_strings: A completion ends before the first of these.
        temperature: Divides the logits; 0 is greedy.
        top_p: Tokens are drawn from the fewest most likely ones that have this share together.
        seed: Of the noise; nothing is drawn when greedy.

    Raises:
        ValueError: A value is out of its range; the sentence names the flag.
    """

    max_new_tokens: int
    stop_strings: tuple[str, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        assert all(self.stop_strings), "an empty stop string would end everything at once"
        if self.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens must be at least 1, not {self.max_new_tokens}.")
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
    """One completion that is wanted.

    Attributes:
        task_id: Which problem.
        sample: Which of its samples, from 0.
        prompt_ids: The prompt's tokens, at least one.
        limit: The most tokens that the completion may have.
    """

    task_id: str
    sample: int
    prompt_ids: list[int]
    limit: int

    @property
    def key(self) -> tuple[str, int]:
        """The task id and the sample's number."""
        return self.task_id, self.sample


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the model wrote after a prompt.

    Attributes:
        text: The text, without the stop string or special tokens; it continues the prompt's text
            exactly, so a leading space is kept.
        num_tokens: Tokens that were generated, the eos or those of the stop string among them.
        finish_reason: "eos", "stop" (a stop string) or "length".
    """

    text: str
    num_tokens: int
    finish_reason: str
