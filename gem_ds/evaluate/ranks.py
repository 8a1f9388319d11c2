"""The ranks of an evaluation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gem_ds.distributed.comm import Comm
from gem_ds.evaluate.arguments import SamplingArguments


@contextmanager
def joined_ranks(arguments: SamplingArguments) -> Iterator[Comm]:
    """The ranks that a launcher has started; without a launcher and --deepspeed just this one."""
    if "RANK" not in os.environ and arguments.deepspeed is None:
        yield Comm(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    # Here, as DeepSpeed takes longer to import than a small evaluation.
    from gem_ds.distributed import process_group

    comm = process_group.init_distributed()
    try:
        with warnings.catch_warnings():  # DeepSpeed calls what torch has renamed
            warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
            yield comm
    finally:
        process_group.leave_distributed()
