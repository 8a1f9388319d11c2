"""The ways to fine-tune that can be asked for by name. No torch here.

The sparse ones of our own differ in two functions only (:mod:`gem_ds.select.rules`):

    method              entry score                 layer score               calibration
    gem                 r = |g| / (|w| + eps)       ||r||_2 * H(r)            yes
    ratio               |g| / (|w| + eps)           1                         yes
    gradient            |g|                         1                         yes
    entropy_gradient    |g|                         ||g||_2 * H(|g|)          yes
    magnitude           |w|                         1                         no
    random              chance                      1                         no
    supertuning         |w|                         how many of the K         no
                                                    largest of all it holds

``gem`` is the method (arXiv 2508.16191), ``ratio`` to ``random`` are its ablations, ``supertuning``
is after arXiv 2607.09287. The others train whole parameters: of the model itself (``full``, and
``bitfit``, its biases only, arXiv 2106.10199) or ones that the library peft adds to it (``lora``,
arXiv 2106.09685; ``ia3``, arXiv 2205.05638; ``shira``, arXiv 2406.13175).
"""

from __future__ import annotations

from typing import Literal

CALIBRATED_METHODS = ("gem", "ratio", "gradient", "entropy_gradient")
SPARSE_METHODS = (*CALIBRATED_METHODS, "magnitude", "random", "supertuning")
DENSE_METHODS = ("full", "bitfit")
ADAPTER_METHODS = ("lora", "ia3", "shira")

METHODS = (*SPARSE_METHODS, *DENSE_METHODS, *ADAPTER_METHODS)


def product_of(method: str) -> Literal["delta", "adapter", "model"]:
    """What a finished run leaves: ``delta.safetensors``, ``adapter/`` of peft, or ``model/``."""
    if method == "full":
        return "model"
    return "adapter" if method in ADAPTER_METHODS else "delta"
