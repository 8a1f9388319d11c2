"""Causal attention over rows that are padded on the right, without a mask for the padding.

No token sees what comes after it, so the padding changes nothing that a token reads, and a mask of
it is needless. transformers (5.23) looks in each forward pass whether some numbers of the mask are
0: the host waits for the device, once or twice for a micro-batch. With padding it makes a mask of
[B, 1, T, T], which keeps attention from the flash kernel and copies heads that share keys; with
flash attention of its own every layer waits, to take the padding out.

To call the model without its mask is no way out: position ids are then searched for packed
sequences, with a wait, and models that count positions by the mask, or leave padding out of their
routers' loss, would miss it. So models get the mask, and what makes a causal mask of it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


@contextmanager
def padded_on_the_right() -> Iterator[None]:
    """While the block lasts, models of transformers make causal masks as if nothing were padded.

    Masks of another kind (of encoders, of images, of packed rows) are made as ever. It holds for
    all threads of the process.
    """
    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS  # by the names of attention's implementations
    local = dict(masks._local_mapping)  # before those that are registered for all
    masks.update({name: partial(_without_padding, make) for name, make in masks.items()})
    try:
        yield
    finally:
        masks._local_mapping.clear()
        masks._local_mapping.update(local)


def _without_padding(make_mask: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A mask by the function that makes it; the option says that a plain causal one would do."""
    if options.get("allow_is_causal_skip"):
        options["attention_mask"] = None
    return make_mask(*args, **options)
