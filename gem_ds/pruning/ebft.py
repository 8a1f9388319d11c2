r"""EBFT: the blocks of a pruned model fitted to those of the dense one (arXiv 2402.12419).

    gem-ds ebft --model_name_or_path PRUNED --dense_model DENSE --text FILE --output_dir DIR

Block after block, over batches of calibration text, with all that is pruned left at 0:

    minimize  mean((f_l(w, s_l) - d_{l+1})^2)          over the entries of w that are not 0, by Adam
    s_{l+1} = f_l(w, s_l)                              w fitted

f_l is block l of the pruned model, w those matrices of its linear layers that were pruned (more
than 5 % zeros, unless a mask names others), s its hidden states, and d those of the dense model.
One block of each model at a time is on the device, and Adam's moments and fp32 masters are those of
one block. What differs from the authors' code: there the target is what the dense block makes of
s_l, so that an error of the blocks before stays; and norms and biases are trained too, with weight
decay and clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gem_ds.files.delta import Delta
from gem_ds.files.fingerprint import fingerprints
from gem_ds.files.mask import Mask, WeightInfo
from gem_ds.models.blocks import find_blocks
from gem_ds.models.encoders import head_names
from gem_ds.models.evaluation_mode import evaluation_mode
from gem_ds.models.targets import ALL_LINEAR, find_targets
from gem_ds.pruning.block_by_block import BlockByBlock
from gem_ds.select.shards import index_dtype
from gem_ds.select.zeros import PRUNED_SHARE
from gem_ds.sparse.quantized import quantization_of

Report = Callable[[str, float, float], object]
"""Takes a block's name and its mean squared error in the first and in the last epoch."""


def fit_blocks(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    target_modules: Sequence[str] | str = ALL_LINEAR,
    mask: Mask | None = None,
    learning_rate: float = 2e-4,
    epochs: int = 10,
    device: torch.device | str | None = None,
    report: Report = lambda *_: None,
) -> Delta:
    """Fit the blocks of a pruned model to those of the model it was made from, in place.

    Args:
        model: of transformers, pruned, whole in this process.
        dense: the same before it was pruned, in any dtype; it stays as it is.
        batches: what the models are called with, each a step of Adam in every epoch; without
            padding, which would count.
        target_modules: as in training (default: all linear layers but the output layer). Their
            weights' entries that are not 0 are trained, where more than 5 % are 0 and the weight
            lies in a block.
        mask: entries of the pruned model to train instead, those that are 0 excepted.
        learning_rate: of the first step of each block; it falls linearly to 0.
        epochs: passes over the batches for each block.
        device: where blocks compute (default: where the model lies).
        report: is told the errors of each block.

    Returns:
        What was trained, as a delta of the pruned model; ``delta.save(path)`` makes a file.

    Raises:
        ValueError: in one sentence, what has to be changed.
    """
    batches = list(batches)
    if not batches or epochs < 1:
        raise ValueError("There is nothing to fit to: pass at least one batch and one epoch.")
    _refuse_other_shapes(model, dense)
    settings = {
        "dense_model": str(dense.name_or_path),
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batches": len(batches),
    }
    trained = _trained_entries(model, target_modules, mask, settings)
    place = torch.device(device) if device is not None else model.device
    with torch.enable_grad(), evaluation_mode(model), evaluation_mode(dense):
        model.requires_grad_(False)
        teacher, student = (BlockByBlock(each, batches, place) for each in (dense, model))
        for name in student.blocks:
            teacher.advance(name)
            weights = [n for n in trained.indices if n.startswith(f"{name}.")]
            if weights:
                entries = {model.get_parameter(n): trained.indices[n] for n in weights}
                errors = _fit(student, name, entries, teacher.states, learning_rate, epochs)
                report(name, *errors)
            student.advance(name)
    values = {n: _at(model.get_parameter(n), index) for n, index in trained.indices.items()}
    return Delta(mask=trained, values=values)


def _refuse_other_shapes(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Both are whole, and every parameter of the one is in the other."""
    for each in (model, dense):
        if any(p.is_meta or hasattr(p, "ds_id") for p in each.parameters()):
            raise ValueError(
                "A model is not whole in this process: load both without ZeRO-3 and device_map."
            )
        if quantization_of(each):
            raise ValueError("A model is quantized: pass the originals.")
    own, other = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model, dense))
    if own != other:
        name = next(n for n in {**own, **other} if own.get(n) != other.get(n))
        raise ValueError(
            f"The dense model has {name} in shape {other.get(name)} and the pruned one in "
            f"{own.get(name)}: pass the model that was pruned."
        )


def _trained_entries(
    model: PreTrainedModel,
    target_modules: Sequence[str] | str,
    given: Mask | None,
    settings: dict[str, Any],
) -> Mask:
    """The target weights' entries in the model's blocks that are not 0, of a given mask if any."""
    names = [target_modules] if isinstance(target_modules, str) else target_modules
    rest = {n: p for n, p in model.named_parameters() if n not in head_names(model)}
    if given is not None:
        given.check_parameters(rest, "the pruned model")
    targets = find_targets(model, names) if given is None else given.indices
    blocks = tuple(f"{name}." for name in find_blocks(model))
    weights = {n: rest[n].detach() for n in targets if n.startswith(blocks)}
    if given is None:  # others are as in the dense model
        weights = {n: w for n, w in weights.items() if _is_pruned(w)}
    if not any(map(_is_pruned, weights.values())):
        raise ValueError(
            f"No target weight in the model's blocks has more than {PRUNED_SHARE:.0%} zeros: pass "
            "the pruned model first, and then the dense one."
        )
    indices = {}
    for n, w in weights.items():
        index = w.reshape(-1).nonzero().flatten().cpu()
        if given is not None:
            index = index[torch.isin(index, given.indices[n].long())]
        indices[n] = index.to(index_dtype(w.numel()))
    return Mask(
        indices=indices,
        weights={n: WeightInfo.of(w.shape, _at(w, indices[n])) for n, w in weights.items()},
        base_model=str(model.name_or_path) or type(model).__name__,
        method="ebft",
        settings=settings,
        fingerprints=fingerprints(rest),
    )


def _is_pruned(weight: Tensor) -> bool:
    return int((weight == 0).sum()) > PRUNED_SHARE * weight.numel()


def _fit(
    student: BlockByBlock,
    name: str,
    entries: Mapping[nn.Parameter, Tensor],
    targets: Sequence[Tensor],
    learning_rate: float,
    epochs: int,
) -> tuple[float, float]:
    """Fit some entries of a block; its mean squared error in the first and in the last epoch."""
    is_bfloat16 = student.states[0].dtype == torch.bfloat16
    with student.on_device(name) as block, _in_float32(block):
        kept = {weight: _others(weight, index) for weight, index in entries.items()}
        optimizer = torch.optim.Adam([weight.requires_grad_() for weight in kept], learning_rate)
        errors = []
        for step in range(num_steps := epochs * len(targets)):
            number = step % len(targets)
            with torch.autocast(student.device.type, torch.bfloat16, enabled=is_bfloat16):
                output = student.output(name, number, torch.float32)
            error = F.mse_loss(output.float(), targets[number].to(student.device, torch.float32))
            optimizer.zero_grad()
            error.backward()
            for weight, others in kept.items():
                if weight.grad is not None:  # an expert may be without tokens
                    weight.grad.masked_fill_(others, 0.0)
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / num_steps)
            optimizer.step()
            errors.append(error.detach())
        for weight in kept:
            weight.requires_grad_(False).grad = None
    by_epoch = torch.stack(errors).view(epochs, -1).mean(dim=1).tolist()
    if not math.isfinite(by_epoch[-1]):
        raise ValueError(f"The error of {name} is not finite: lower the learning rate.")
    return by_epoch[0], by_epoch[-1]


@contextmanager
def _in_float32(block: nn.Module) -> Iterator[None]:
    """While the block lasts, a module's parameters are fp32 masters; then rounded to what it has.

    Of those that did not change this gives back the bits.
    """
    dtypes = {parameter: parameter.dtype for parameter in block.parameters()}
    try:
        for parameter in dtypes:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)


def _others(weight: Tensor, flat_indices: Tensor) -> Tensor:
    """Which entries of a weight are not among the given ones, bool, in its shape."""
    others = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    others[flat_indices.to(weight.device, torch.int64)] = False
    return others.view(weight.shape)


def _at(weight: Tensor, flat_indices: Tensor) -> Tensor:
    """The values of a weight at flat indices, on the CPU."""
    return weight.detach().reshape(-1)[flat_indices.to(weight.device, torch.int64)].cpu()
