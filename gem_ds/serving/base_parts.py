"""The base's values at a mask's entries, put together from the processes that hold parts of them.

Under tensor parallelism a process has some entries of a weight, or a copy of those of another one.
Whoever drives the processes gathers the parts, and knows then that every entry has a place and
that the model is the base which the mask was made for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from safetensors.torch import load, save

from gem_ds.files.mask import Mask
from gem_ds.serving.delta_set import Swap


def pack_base(swaps: Iterable[Swap]) -> bytes:
    """What one process has of the base: a safetensors file, its tensors in pairs, numbered."""
    tensors = {}
    for number, swap in enumerate(swaps):
        chosen = torch.arange(swap.base.numel()) if swap.chosen is None else swap.chosen
        tensors[f"{number}.chosen.{swap.weight}"] = chosen.cpu()
        tensors[f"{number}.base.{swap.weight}"] = swap.base.cpu().contiguous()
    return save(tensors)


def check_parts(mask: Mask, parts: Sequence[bytes]) -> None:
    """Refuse parts that do not make up the mask's base.

    Raises:
        ValueError: An entry is nowhere, or the base is another one.
    """
    base, found = {}, {}
    for name, info in mask.weights.items():
        count = mask.indices[name].numel()
        base[name] = torch.zeros(count, dtype=getattr(torch, info.dtype))
        found[name] = torch.zeros(count, dtype=torch.bool)
    for part in parts:
        tensors = load(part)
        for key, chosen in tensors.items():
            number, kind, name = key.split(".", 2)
            if kind == "chosen":
                base[name][chosen] = tensors[f"{number}.base.{name}"]
                found[name][chosen] = True
    for name, has in found.items():
        if missing := int((~has).sum()):
            raise ValueError(
                f"the engine has no place for {missing} of {len(has)} entries of {name!r}: it "
                "cannot serve this delta; export the model instead (gem-ds export)"
            )
    mask.check_base(base, "delta")
