"""Pruning: the weights of linear layers that matter least become 0, for a model to start from.

For the weight w [outputs, inputs] of a layer, the lowest of these scores become exactly 0:

    magnitude    |w_ij|
    wanda        |w_ij| ||x_j||_2         x_j: input j over all tokens of some batches

(Wanda, Sun et al., arXiv 2306.11695, eq. 1.) A share of zeros is one of the whole matrix by
magnitude, and of each row by Wanda; 2:4 leaves two of each four neighbours of a row. The inputs of
a block are those that the pruned blocks before it give, as in the paper: each block runs twice over
the batches, one at a time on the device. Weights that are left are not changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from gem_ds.models.encoders import head_names
from gem_ds.models.evaluation_mode import evaluation_mode
from gem_ds.models.targets import ALL_LINEAR, find_targets
from gem_ds.pruning.block_by_block import BlockByBlock, NoChainError
from gem_ds.sparse.experts import projections_of
from gem_ds.sparse.kinds import kind_of
from gem_ds.sparse.quantized import is_quantized


@torch.no_grad()
def prune(
    model: Any,
    sparsity: float | str,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    *,
    target_modules: Sequence[str] | str = ALL_LINEAR,
    device: torch.device | str | None = None,
) -> None:
    """Set the least weights of a model's linear layers to 0, in place.

    Args:
        model: of transformers, whole in this process.
        sparsity: the share of zeros, in (0, 1), or "2:4" and other n:m, for n of m that stay.
        batches: what the model is called with, without padding, which would count; with them
            Wanda's scores decide, without them magnitudes.
        target_modules: as in training (default: all linear layers but the output layer). Experts
            that are kept as one parameter stay as they are.
        device: where the batches are computed, a block at a time (default: where the model lies).

    Raises:
        ValueError: in one sentence, what has to be changed.
    """
    names = [target_modules] if isinstance(target_modules, str) else target_modules
    heads = head_names(model)
    targets = {
        name: module
        for name, module in find_targets(model, names).items()
        if name not in heads and not projections_of(module)
    }
    if not targets:
        raise ValueError(
            f"--target_modules {' '.join(names)} names nothing that can be pruned: experts that "
            "are kept as one parameter stay as they are."
        )
    if any(p.is_meta or hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            "The model is not whole in this process: load it without ZeRO-3 and device_map."
        )
    if any(map(is_quantized, targets.values())):
        raise ValueError("The model is quantized: prune the original.")
    zeros = parse_sparsity(sparsity)
    groups = {
        n: _group(n, _matrix(m), zeros, by_row=batches is not None) for n, m in targets.items()
    }
    batches = None if batches is None else list(batches)
    if batches == []:
        raise ValueError("There are no batches: pass at least one, or None to go by magnitude.")
    place = torch.device(device) if device is not None else model.device
    with evaluation_mode(model):
        for layers, run in _parts(model, targets, batches or [], place):
            norms = _norms(layers, run) if batches else {}
            for name, layer in layers.items():
                weight = _matrix(layer)
                _clear_lowest(weight, weight.float().abs() * norms.get(name, 1.0), *groups[name])


def _parts(
    model: Any,
    targets: Mapping[str, nn.Module],
    batches: Sequence[Mapping[str, Tensor]],
    device: torch.device,
) -> Iterator[tuple[dict[str, nn.Module], Callable[[], None]]]:
    """The target layers block after block, and what runs the batches through those at hand.

    Blocks that are no chain, and layers outside of blocks, cost a pass of the whole model each.
    """
    try:
        stream = BlockByBlock(model, batches, device) if batches else None
    except NoChainError:
        stream = None
    rest = dict(targets)
    if stream is not None:
        for name in stream.blocks:
            own = {n: rest.pop(n) for n in targets if n.startswith(f"{name}.")}
            with stream.on_device(name):
                yield own, partial(stream.run, name)
            stream.advance(name)

    def run() -> None:
        for batch in batches:
            model(**{key: tensor.to(model.device) for key, tensor in batch.items()})

    for _, block in groupby(rest, key=_block_of):
        yield {name: rest[name] for name in block}, run


def _matrix(module: nn.Module) -> Tensor:
    """The weight as [outputs, inputs], to be written."""
    kind = kind_of(module)
    assert kind is not None, "a target is a linear layer"
    return kind.matrix(module.get_parameter("weight").data)


def _block_of(name: str) -> str:
    """Where a layer stands: model.layers.3.self_attn.q_proj.weight is of model.layers.3."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name


def parse_sparsity(sparsity: float | str) -> float | tuple[int, int]:
    """The share of zeros, or (n, m) of "n:m"; a ValueError says what it can be."""
    pattern = re.fullmatch(r"(\d+):(\d+)", str(sparsity))
    if pattern and 0 < int(pattern[1]) < int(pattern[2]):
        return int(pattern[1]), int(pattern[2])
    try:
        share = float(sparsity)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(
            f"The sparsity is {sparsity}: give a share of zeros above 0 and below 1, or n:m with n "
            "of m that stay, such as 2:4."
        )
    return share


def _group(
    name: str, weight: Tensor, zeros: float | tuple[int, int], *, by_row: bool
) -> tuple[int, int]:
    """How many entries of a matrix, row after row, are compared, and how many become 0 of these."""
    if isinstance(zeros, tuple):
        left, size = zeros
        if weight.shape[1] % size:
            raise ValueError(
                f"The rows of {name} have {weight.shape[1]} entries, which {left}:{size} cannot "
                "share out: leave it out of target_modules."
            )
        return size, size - left
    size = weight.shape[1] if by_row else weight.numel()
    return size, int(zeros * size)


def _clear_lowest(weight: Tensor, scores: Tensor, size: int, count: int) -> None:
    """Of each ``size`` entries clear the ``count`` with the lowest scores, the first of equals."""
    order = scores.reshape(-1, size).argsort(dim=1, stable=True)[:, :count]
    lowest = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device).view(-1, size)
    weight.masked_fill_(lowest.scatter_(1, order, True).view(scores.shape), 0.0)


def _norms(layers: Mapping[str, nn.Module], run: Callable[[], None]) -> dict[str, Tensor]:
    """``||x_j||_2`` of each layer's inputs over all tokens that ``run`` reads, fp32 [inputs]."""
    squares: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            squares[name] = squares.get(name, 0) + x.square().sum(dim=0)

        return add

    handles = [layer.register_forward_pre_hook(listen(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if unreached := layers.keys() - squares.keys():
        raise ValueError(
            f"The model does not run {', '.join(sorted(unreached))}: leave such layers out of "
            "target_modules."
        )
    return {name: total.sqrt() for name, total in squares.items()}
