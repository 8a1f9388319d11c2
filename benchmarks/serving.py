"""Swapping deltas in place, and keeping a second model at a trainer's values: seconds and bytes.

    python benchmarks/serving.py [--rounds 30] [--density 0.001] [--layers 30]

The model has the shape of SmolLM2-135M, random weights in bf16, and deltas of random entries of
its projections. On the GPU where there is one, else on the CPU; the second model is in another
process, over loopback on the CPU. In each round everything runs once, so that whatever else the
machine does meets all alike; printed are the median, the least and the greatest.

    read        the entries of one delta, once; as the next two in seconds of the CPU on a CPU,
                where other work would be counted in otherwise
    swap        one delta for another with `DeltaSet.use`
    reload      all weights copied from a second model in memory, what swapping models would take
    sync        a step's values from the trainer's model into the other's (`DeltaSender.send`)
    broadcast   every weight by torch.distributed (gloo), what it replaces
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import multiprocessing
import os
import socket
import statistics
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist  # noqa: TID251 - what a sync replaces
from steps.turns import seconds
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gem_ds import DeltaReceiver, DeltaSender, DeltaSet
from gem_ds.distributed.comm import free_port
from gem_ds.files.delta import Delta
from gem_ds.files.fingerprint import fingerprints
from gem_ds.files.mask import Mask, WeightInfo

#: Parameters of the layers that are targets, by their models' configurations.
SIZES = {
    "1B (Llama 3.2)": 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192),
    "8B (Llama 3.1)": 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336),
    "70B (Llama 3.1)": 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672),
}
TOTALS = {"1B (Llama 3.2)": 1.236e9, "8B (Llama 3.1)": 8.030e9, "70B (Llama 3.1)": 70.554e9}


def make_model(layers: int) -> nn.Module:
    """SmolLM2-135M with these layers, the same weights in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    return LlamaForCausalLM(config).bfloat16()


def random_delta(model: nn.Module, density: float, seed: int) -> Delta:
    """Of entries of the projections, as many in each as its share."""
    generator = torch.Generator().manual_seed(seed)
    indices, weights, values = {}, {}, {}
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            count = max(1, int(weight.numel() * density))
            found = torch.randint(weight.numel(), (count,), generator=generator).unique()
            base = weight.detach().flatten()[found.to(weight.device)].cpu()
            indices[name], weights[name] = found.int(), WeightInfo.of(weight.shape, base)
            values[name] = torch.randn(len(found), generator=generator).to(weight.dtype)
    mask = Mask(
        indices=indices,
        weights=weights,
        base_model="random",
        settings={},
        fingerprints=fingerprints(dict(model.named_parameters())),
    )
    return Delta(mask=mask, values=values)


def told(name: str, found: Sequence[float], per: Sequence[float] | None = None) -> None:
    """Milliseconds, and the ratio round by round."""
    line = f"{name:10} {statistics.median(found) * 1e3:9.2f} ms"
    line += f" ({min(found) * 1e3:.2f} to {max(found) * 1e3:.2f})"
    if per is not None:
        ratios = [a / b for a, b in zip(found, per, strict=True)]
        line += f"   ratio {statistics.median(ratios):.4g} ({min(ratios):.4g} to {max(ratios):.4g})"
    print(line, flush=True)


def swaps(model: nn.Module, deltas: Sequence[Delta], rounds: int) -> None:
    """Ten deltas on one base."""
    device = next(model.parameters()).device
    base = digest(model)
    other = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    held = DeltaSet(model)
    for number, delta in enumerate(deltas):
        held.add(str(number), delta)
    entries = sum(delta.mask.num_selected for delta in deltas)
    size = sum(weight.nbytes for weight in model.parameters())
    print(
        f"{len(deltas)} deltas of {entries // len(deltas):,} entries beside {size / 2**20:.1f} MiB "
        f"of weights: {entries * 6 / 2**20:.1f} MiB of indices and values, and "
        f"{entries * 2 / 2**20:.1f} MiB of base bits"
    )
    flat = {name: weight.detach().view(-1) for name, weight in model.named_parameters()}
    index = {name: found.to(device) for name, found in deltas[0].mask.indices.items()}

    def read() -> object:
        return [flat[name].index_select(0, found) for name, found in index.items()]

    def reload() -> None:
        for name, weight in model.named_parameters():
            weight.data.copy_(other[name])

    times: dict[str, list[float]] = {"read": [], "swap": [], "reload": []}
    for turn in range(rounds):
        times["read"].append(seconds(read))
        held.use(str(turn % 10))
        then = str((turn + 1) % 10)
        times["swap"].append(seconds(functools.partial(held.use, then)))
        held.use(None)
        times["reload"].append(seconds(reload))
    for name, found in times.items():
        told(name, found, times["read"])
    for turn in range(1000):
        held.use([*held.names, None][turn * 7 % 11])
    held.use(None)
    assert digest(model) == base
    print("after a thousand swaps: the bits of the base")


def digest(model: nn.Module) -> str:
    """Of all bits of all parameters."""
    found = hashlib.sha256()
    for weight in model.parameters():
        found.update(weight.detach().cpu().view(torch.uint8).numpy().data)
    return found.hexdigest()


def other_process(
    address: tuple[str, int], port: int, args: argparse.Namespace, pipe: Connection
) -> None:
    """The model that generates."""
    torch.set_num_threads(1)
    model = make_model(args.layers)
    join(1, port)
    receiver = DeltaReceiver(DeltaSet(model), socket.create_connection(address))
    receiver.receive()
    for _ in range(args.rounds):
        receiver.receive()
        pipe.send(digest(model))
        dist.barrier()
        for weight in model.parameters():
            dist.broadcast(weight.data, 0)
        dist.barrier()
    dist.destroy_process_group()


def join(rank: int, port: int) -> None:
    """Two processes of torch.distributed."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)


def syncs(args: argparse.Namespace) -> None:
    """A trainer's values in another process."""
    model = make_model(args.layers)
    mask = random_delta(model, args.density, 0).mask
    sender, port = DeltaSender(mask), free_port()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=other_process, args=(sender.address, port, args, theirs))
    process.start()
    join(0, port)
    once = seconds(lambda: sender.start(1))
    print(f"mask, once: {sender.num_bytes:,} bytes, {once * 1e3:.0f} ms with its checks")
    flat = {name: weight.detach().view(-1) for name, weight in model.named_parameters()}
    index = {name: found.long() for name, found in mask.indices.items()}
    times: dict[str, list[float]] = {"broadcast": [], "sync": []}
    before = sender.num_bytes

    def sync() -> None:
        sender.send({name: flat[name][found] for name, found in index.items()})

    def broadcast() -> None:
        for weight in model.parameters():
            dist.broadcast(weight.data, 0)
        dist.barrier()

    for _ in range(args.rounds):
        for name, found in index.items():  # the optimizer's step
            flat[name].index_copy_(0, found, torch.randn(len(found)).bfloat16())
        times["sync"].append(seconds(sync))
        assert ours.recv() == digest(model), "the other model has other bits"
        dist.barrier()
        times["broadcast"].append(seconds(broadcast))
    size = sum(weight.nbytes for weight in model.parameters())
    print(
        f"a sync: {(sender.num_bytes - before) // args.rounds:,} bytes, a broadcast: {size:,}; the "
        f"receiver had the trainer's bits after each of {args.rounds}"
    )
    for name, durations in times.items():
        told(name, durations, times["broadcast"])
    process.join()
    sender.close()
    dist.destroy_process_group()


def counts(density: float) -> None:
    """Bytes for models that are not here."""
    print("| model | entries | mask, once | a sync | all weights | of them |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, targets in SIZES.items():
        entries, whole = int(targets * density), 2 * TOTALS[name]
        print(
            f"| {name} | {entries:,} | {4 * entries / 1e6:.1f} MB | {2 * entries / 1e6:.1f} MB | "
            f"{whole / 1e9:.1f} GB | 1 / {whole / (2 * entries):.0f} |"
        )


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--layers", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model(args.layers).to("cuda" if torch.cuda.is_available() else "cpu")
    swaps(model, [random_delta(model, args.density, seed) for seed in range(10)], args.rounds)
    syncs(args)
    counts(args.density)


if __name__ == "__main__":
    main()
