"""How ZeRO-3 gathers weights where the DeepSpeed JSON leaves that open: a decoder block at a time.

A *leaf module* is one whose weights DeepSpeed gathers together, when it starts, and lets go
together. With the decoder blocks as leaves and the next block gathered ahead, a block is one
message in each pass instead of one for each of its matrices; and a frozen block whose activations
are recomputed is gathered for forward and backward pass, where single layers are gathered for the
recomputation once more. Small parameters then come with their block, so none stays on every rank.

Two blocks stand gathered at a time, where single layers would be a few matrices; without a limit
every module that starts would gather one ahead. What is used again before a block's entries of
others stays meanwhile: a tied embedding until the output layer has run (blocks count nothing on the
way there), an output layer until its backward pass. DeepSpeed by itself keeps what is used again
within 10^9 entries, which of a smaller model is every weight from its forward to its backward pass.

Only frozen blocks are leaves: DeepSpeed 0.19 sends gradients of a leaf when its backward pass
begins if its input needs none, before there are any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: DeepSpeed's own ``stage3_max_live_parameters``.
_MAX_LIVE = 10**9


def fill_stage3(zero: dict[str, Any], hidden_size: int, blocks: Mapping[str, int]) -> None:
    """Complete ``zero_optimization`` of stage 3, where it is missing or says "auto".

    ``blocks`` are the entries of the model's decoder blocks by the names of their classes. *The
    rule*: such a class is a leaf if its blocks have at most ``stage3_max_live_parameters`` entries
    (10^9 unless the JSON says otherwise) and the JSON names no leaves itself. Without leaves the
    sizes are those that transformers would fill in.
    """
    given = zero.get("stage3_max_live_parameters", "auto")
    limit = _MAX_LIVE if given == "auto" else given
    leaves = {name: size for name, size in blocks.items() if size <= limit}
    if leaves and not (zero.get("leaf_module") or zero.get("stage3_module_granularity_threshold")):
        zero["leaf_module"] = {"classes": sorted(leaves)}
        largest = max(leaves.values())
        fill(zero, "stage3_prefetch_bucket_size", largest)
        fill(zero, "stage3_max_live_parameters", 2 * largest)
        fill(zero, "stage3_max_reuse_distance", largest)
        fill(zero, "stage3_param_persistence_threshold", 0)
    fill(zero, "stage3_prefetch_bucket_size", int(0.9 * hidden_size**2))
    fill(zero, "stage3_param_persistence_threshold", 10 * hidden_size)


def fill(section: dict[str, Any], key: str, value: int) -> None:
    """Give a key that is missing or "auto" its value."""
    if section.get(key, "auto") == "auto":
        section[key] = value
