r"""Merging: the deltas of several tasks as one, by the formulas of the field.

    gem-ds delta merge a.safetensors b.safetensors --weights 1 1 --model_name_or_path M \
        --output_file merged.safetensors

With ``d_i`` [U] the difference of delta i from the base at the union of all entries, 0 where it has
none:

    linear        merged = base + sum_i w_i d_i
    ties          arXiv 2306.01708: of each d_i the largest are kept, the sign of their sum is
                  elected, and the w_i d_i of that sign are averaged
    dare_linear   arXiv 2311.03099: of each d_i entries are kept by chance and divided by the
                  density, then as linear

peft's density counts the entries of a whole weight, where a delta is sparse already; here it is a
share of the delta's own entries. All of them are ``base (1 - sum_i c_i) + sum_i c_i v_i`` with
coefficients c_i [U], and are computed so, in fp64: where c_i is 1 and alone, v_i comes out again.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gem_ds.files.delta import Delta
from gem_ds.files.mask import WeightInfo
from gem_ds.flags import name_of
from gem_ds.models.export import load_base
from gem_ds.select.shards import index_dtype

Method = Literal["linear", "ties", "dare_linear"]


def merge_deltas(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    base: nn.Module | Mapping[str, Tensor],
    *,
    method: Method = "linear",
    density: float = 1.0,
    seed: int = 0,
) -> Delta:
    """Merge deltas of one base into an ordinary delta.

    Args:
        deltas: At least one; their masks may differ.
        weights: As many; finite.
        base: The base model, or its weights by name, in the deltas' dtype.
        method: One of the module's.
        density: In (0, 1], of ``ties`` and ``dare_linear``: the share of each delta's entries that
            is kept.
        seed: Of ``dare_linear``.

    Returns:
        A delta of the union of the entries.

    Raises:
        ValueError: In one sentence, what does not fit: another base, a head, a weight or density
            out of range, a merged value that the dtype cannot hold.
    """
    _check(deltas, weights, method, density)
    parameters: Mapping[str, Tensor]
    if isinstance(base, nn.Module):
        parameters, noun = dict(base.named_parameters(remove_duplicate=False)), type(base).__name__
    else:
        parameters, noun = base, "base"
    for delta in deltas:
        delta.mask.check_parameters(parameters, noun, "delta")
    factors = torch.tensor(weights, dtype=torch.float64)[:, None]
    indices, infos, values = {}, {}, {}
    for name in dict.fromkeys(name for delta in deltas for name in delta.values):
        own = {i: d.mask.indices[name] for i, d in enumerate(deltas) if name in d.values}
        union = torch.unique(torch.cat(list(own.values())))
        weight = parameters[name].detach()
        there = weight.reshape(-1)[union.to(weight.device).long()].cpu()
        trained = there.double().repeat(len(deltas), 1)  # a delta without entries there is the base
        kept = torch.zeros(trained.shape, dtype=torch.bool)
        for i, index in own.items():
            places = torch.searchsorted(union, index)
            trained[i, places] = deltas[i].values[name].double()
            difference = trained[i, places] - there[places]
            kept[i, places[_kept(difference, method, density, f"{seed}/{i}/{name}")]] = True
        c = factors * _coefficients(trained - there.double(), kept, method, density)
        merged = (1 - c.sum(dim=0)) * there.double() + (c * trained).sum(dim=0)
        indices[name] = union.to(index_dtype(weight.numel()))
        infos[name] = WeightInfo.of(weight.shape, there)
        values[name] = merged.to(there.dtype)
    first = deltas[0].mask
    settings = {
        "weights": list(weights),
        "density": density,
        "seed": seed,
        "merged": [{"method": d.mask.method, "settings": d.mask.settings} for d in deltas],
    }
    mask = replace(
        first, indices=indices, weights=infos, method=f"merge_{method}", settings=settings
    )
    return Delta(mask=mask, values=values)


def _check(deltas: Sequence[Delta], weights: Sequence[float], method: str, density: float) -> None:
    if method not in get_args(Method):
        raise ValueError(f"There is no method {method!r}: pass {', '.join(get_args(Method))}.")
    if not deltas or len(weights) != len(deltas):
        raise ValueError(f"{len(deltas)} deltas have {len(weights)} weights: pass one for each.")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"The weights {list(weights)} are not all finite.")
    if not 0 < density <= 1:
        raise ValueError(f"The density is {density}: it must be above 0 and at most 1.")
    if method == "linear" and density != 1:
        raise ValueError("linear drops no entries: leave density out, or pass ties or dare_linear.")
    if any(delta.head for delta in deltas):
        raise ValueError(
            "A delta has a task head, and heads of several tasks are no mean: merge "
            "deltas without one."
        )


def _kept(difference: Tensor, method: str, density: float, key: str) -> Tensor:
    """Which of its own entries a delta keeps, of its difference [k] there: their places in it."""
    count = len(difference)
    if method == "ties":
        order = difference.abs().argsort(descending=True, stable=True)
        return order[: int(density * count)]
    if method == "dare_linear":
        digest = hashlib.sha256(key.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        chances = torch.rand(count, dtype=torch.float64, generator=generator)
        return (chances < density).nonzero().flatten()
    return torch.arange(count)


def _coefficients(differences: Tensor, kept: Tensor, method: str, density: float) -> Tensor:
    """What the deltas' weights are multiplied by, fp64 [deltas, U]."""
    if method != "ties":
        return kept.double() / density
    signs = (differences * kept).sign()
    elected = torch.where((differences * kept).sum(dim=0) >= 0, 1.0, -1.0)
    agrees = (signs == elected).double()
    return agrees / agrees.sum(dim=0).clamp(min=1)


def main(argv: Sequence[str] | None = None) -> None:
    """The program ``gem-ds delta merge``; raises what :func:`merge_deltas` does."""
    parser = argparse.ArgumentParser(
        prog=name_of("delta merge"), description="Merge the deltas of several tasks into one."
    )
    parser.add_argument("deltas", nargs="+", type=Path, help="their files")
    parser.add_argument("--weights", nargs="+", type=float, help="one for each (default: 1)")
    parser.add_argument("--model_name_or_path", required=True, help="the base model of all")
    parser.add_argument("--output_file", required=True, type=Path, help="file to write")
    parser.add_argument("--method", default="linear", choices=get_args(Method))
    parser.add_argument(
        "--density", type=float, default=1.0, help="share of each delta's entries that is kept"
    )
    parser.add_argument("--seed", type=int, default=0, help="of dare_linear")
    args = parser.parse_args(argv)
    if args.output_file.exists():
        raise ValueError(f"--output_file {args.output_file} exists: name another.")
    deltas = [Delta.load(path) for path in args.deltas]
    base = load_base(args.model_name_or_path, deltas[0])
    merged = merge_deltas(
        deltas,
        args.weights or [1.0] * len(deltas),
        base,
        method=args.method,
        density=args.density,
        seed=args.seed,
    )
    merged.save(args.output_file)
    print(f"{args.output_file}: {merged.mask.num_selected:,} entries, of {len(deltas)} deltas")
