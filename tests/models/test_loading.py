"""What the host of a rank holds while a model is loaded, at each ZeRO stage on two real ranks."""

import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gem_ds.distributed.process_group import init_distributed
from gem_ds.models.load import DTYPES, load_for_training, trainable_config
from tests.ranks import run_ranks
from tests.tiny import Setting

pytestmark = pytest.mark.slow  # starts engines or programs

MMAP_THRESHOLD = -3  # of mallopt
PAGE = os.sysconf("SC_PAGE_SIZE")


def _own_bytes() -> int:
    """Memory of this process but for mapped files, which all ranks and the cache share."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * PAGE


@contextmanager
def _peak() -> Iterator[list[int]]:
    """The most that the block takes beyond what was there."""
    before, most, is_over = _own_bytes(), [0], threading.Event()

    def look() -> None:
        while not is_over.wait(0.001):
            most[0] = max(most[0], _own_bytes() - before)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield most
    finally:
        is_over.set()
        watcher.join()


def _load(folder: str) -> dict[tuple[int, str], int]:
    """The peak by stage and dtype."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**16)  # what is freed is given back
    comm, found = init_distributed(), {}
    for stage in range(4):
        for name in ("fp32", "bf16"):
            deepspeed = Setting(stage, name).config(comm.world_size, 1.0, 1, {})
            dtype, config = DTYPES[name], trainable_config(folder)
            gc.collect()
            with _peak() as peak:
                model, _ = load_for_training(folder, config, deepspeed, comm, dtype=dtype, seed=0)
            found[stage, name] = peak[0]
            del model
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of 305 MB in fp32, in four files."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=8,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path, max_shard_size="90MB")
    return str(path)


def test_a_rank_holds_hardly_more_than_what_stays(folder):
    """Which at stage 3 is its half."""
    files = list(Path(folder).glob("*.safetensors"))
    assert len(files) == 4
    num_bytes = {"fp32": sum(file.stat().st_size for file in files)}
    assert num_bytes["fp32"] > 300e6
    num_bytes["bf16"] = num_bytes["fp32"] // 2
    for found in run_ranks(2, _load, folder):
        for (stage, name), peak in found.items():
            stays = num_bytes[name] // (2 if stage == 3 else 1)
            assert peak <= 1.2 * stays, (stage, name)


def test_weights_go_to_the_device_themselves(folder):
    """Below stage 3; here to one that holds nothing."""
    comm: Any = SimpleNamespace(device=torch.device("meta"), agreement=nullcontext)
    with _peak() as peak:
        model, _ = load_for_training(
            folder,
            trainable_config(folder),
            {"zero_optimization": {"stage": 2}},
            comm,
            dtype=torch.bfloat16,
            seed=0,
        )
    assert all(weight.is_meta for weight in model.parameters())
    assert peak[0] < 2**24
