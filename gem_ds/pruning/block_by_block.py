"""Calibration batches on their way through a model of which one block at a time is on the device.

    s_0 = what the first block reads             s_{l+1} = block_l(s_l, what else it is called with)

Between two blocks the hidden states s of all batches wait in the host's memory, in the model's
dtype. What a block is called with beside them (position embeddings, masks) is found beforehand, by
a forward pass in which each block hands on what it reads; so the embedding runs where the model
lies, and nothing else of it ever has to fit on the device.

For models of transformers whose blocks are a chain: each reads what the one before it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gem_ds.models.blocks import find_blocks

#: Per batch: hidden states, and the other arguments by position and by keyword.
_Calls = list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]


class NoChainError(ValueError):
    """A model's blocks cannot be taken one at a time."""


class BlockByBlock:
    """The batches' hidden states before one of a model's blocks, and what takes them further.

    The model is in eval mode and caches nothing as long as this is used. A model whose blocks are
    no chain is a :class:`NoChainError`.
    """

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], device: torch.device
    ) -> None:
        self.device = device  # where a block computes
        calls = _calls(model, batches)
        self.blocks = {name: model.get_submodule(name) for name in calls}  # as they are run
        self.states = [states for states, *_ in next(iter(calls.values()))]  # of each batch
        self._others = {name: [others for _, *others in each] for name, each in calls.items()}

    @contextmanager
    def on_device(self, name: str) -> Iterator[nn.Module]:
        """While the block lasts, this block of the model is on the device."""
        block = self.blocks[name]
        home = next(block.parameters()).device
        try:
            yield block.to(self.device)
        finally:
            block.to(home)

    def output(self, name: str, number: int, dtype: torch.dtype | None = None) -> Tensor:
        """What a block on the device makes of the present states of one batch.

        Computed from arguments in ``dtype``, if one is given.
        """
        args, kwargs = self._others[name][number]
        arguments = _placed((self.states[number], *args), self.device, dtype)
        output = self.blocks[name](*arguments, **_placed(kwargs, self.device, dtype))
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def run(self, name: str) -> None:
        """Run a block on the device over the present states of all batches, for its hooks."""
        for number in range(len(self.states)):
            self.output(name, number)

    @torch.no_grad()
    def advance(self, name: str) -> None:
        """Take the states of all batches through a block."""
        with self.on_device(name):
            for number, states in enumerate(self.states):
                self.states[number] = self.output(name, number).to(states)


def _calls(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, _Calls]:
    """By block, in the order in which they run, what each batch calls it with.

    ``states`` are those of the first block throughout, as no block computes anything.
    """
    base: Any = model.base_model
    blocks = find_blocks(model)
    calls: dict[str, _Calls] = {}
    for form in _FORMS:
        calls.clear()
        try:
            with torch.no_grad(), _handing_on(blocks, calls, form):
                for batch in batches:
                    base(**{k: v.to(model.device) for k, v in batch.items() if k != "labels"})
        except NoChainError:
            raise
        except (_TakenApartError, ValueError, TypeError):
            calls.clear()  # the model takes apart what a block gives in another way
            continue
        break
    if not calls or not _is_chain(list(calls.values()), len(batches)):
        raise NoChainError(
            f"The blocks of {type(model).__name__} are no chain in which each reads just what the "
            "one before it gives, so they cannot be fitted one at a time: train the model as a "
            "whole."
        )
    return calls


class _TakenApartError(Exception):
    """A model takes of what a block gives the first part."""


#: What a block gives for its hidden states: them, or a tuple, with attentions that nobody wants.
_FORMS: tuple[Callable[[Tensor], Any], ...] = (lambda s: s, lambda s: (s, None, None))


@contextmanager
def _handing_on(
    blocks: Mapping[str, nn.Module], calls: dict[str, _Calls], form: Callable[[Tensor], Any]
) -> Iterator[None]:
    """While the block lasts, blocks note their calls and return the states that they are given."""

    def forward_of(name: str) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.setdefault(name, []).append((hidden_states, args, kwargs))
            if hidden_states.dim() < next(iter(calls.values()))[0][0].dim():
                raise _TakenApartError
            return form(hidden_states)

        return forward

    if any("forward" in vars(block) for block in blocks.values()):
        raise NoChainError("Blocks have forwards of their own: load the model without device_map.")
    for name, block in blocks.items():
        block.forward = forward_of(name)
    try:
        yield
    finally:
        for block in blocks.values():
            del block.forward


def _is_chain(calls: Sequence[_Calls], num_batches: int) -> bool:
    """Whether every batch has run each block once, on the very states that the others saw."""
    return all(len(each) == num_batches for each in calls) and all(
        one[0] is first[0] for each in calls for one, first in zip(each, calls[0], strict=True)
    )


def _placed(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The tensors in a value on the device, those of floats in ``dtype`` if one is given."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, (tuple, list)):
        return type(value)(_placed(each, device, dtype) for each in value)
    if isinstance(value, dict):
        return {key: _placed(each, device, dtype) for key, each in value.items()}
    return value
