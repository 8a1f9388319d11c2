"""Adapters of peft's method SHiRA, which trains entries too: a delta as one, and one as a delta.

    adapter_model.safetensors   base_model.model.<module>.shira_weight    fp32 [n], differences
                                base_model.model.<module>.shira_indices   int32 [2, n]: row, column
                                n = r (rows + columns), with one r for all modules

Entries that are fewer are filled up with a repeated one and the difference 0. A difference d of a
value v from its base w is rounded, and w + d may be another number than v; such an entry gets a
second difference, as repeated entries are added in their order (sparse addition of torch on a CPU,
in fp32). The result is v to the bit, but for a -0.0, which comes out as 0.0 where fp32 has no
number that rounds to it.

A delta from an adapter has the values that merging it gives, computed as peft does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import ShiraConfig
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor

from gem_ds.files.delta import Delta
from gem_ds.files.fingerprint import fingerprints, read_whole
from gem_ds.files.mask import Mask, WeightInfo
from gem_ds.models.export import base_weights
from gem_ds.models.weight_files import map_model, name_in_files
from gem_ds.select.shards import index_dtype

_PREFIX = "base_model.model."
#: Of a shape that r(m + n) does not reach: peft refuses it.
_TOO_MANY = (
    "SHiRA has r (rows + columns) entries in each weight, with one r, and {name} of shape {shape} "
    "has no room for r = {r}, which the fullest weight asks for: export it with another --format."
)


def prepare_shira(
    delta: Delta, base: str, *, trust_remote_code: bool = False
) -> Callable[[Path], list[str]]:
    """What fills a folder that peft loads as a SHiRA adapter; refuses what SHiRA cannot hold."""
    shapes = {name: info.shape for name, info in delta.mask.weights.items()}
    if delta.head:
        raise ValueError(
            "The delta has a task head, which SHiRA's entries cannot hold: export the whole model."
        )
    if delta.dtype == torch.float64:
        raise ValueError("SHiRA has differences in fp32, which cannot hold those of float64.")
    for name, shape in shapes.items():
        if not name.endswith(".weight") or len(shape) != 2:
            raise ValueError(f"{name} is no linear layer's weight, so SHiRA has no entries of it.")
    weights = base_weights(delta, base, trust_remote_code=trust_remote_code)
    parts = {
        name: _differences(values, weights[name], delta.mask.indices[name])
        for name, values in delta.values.items()
    }
    r = max(-(-len(d) // sum(shapes[name])) for name, (_, d) in parts.items()) or 1
    for name, (rows, columns) in shapes.items():
        if r * (rows + columns) > rows * columns:
            raise ValueError(_TOO_MANY.format(name=name, shape=shapes[name], r=r))
    config = ShiraConfig(
        r=r,
        mask_type="gem",  # type: ignore[arg-type]  # none of peft's: the indices are the file's
        target_modules=sorted(name.removesuffix(".weight") for name in shapes),
        base_model_name_or_path=delta.mask.base_model,
        revision=delta.mask.revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )

    def write(folder: Path) -> list[str]:
        tensors = {}
        for name, (flat, d) in parts.items():
            rows, columns = shapes[name]
            missing = r * (rows + columns) - len(d)
            first = flat[:1] if len(flat) else flat.new_zeros(1)
            flat, d = torch.cat([flat, first.expand(missing)]), torch.cat([d, d.new_zeros(missing)])
            prefix = f"{_PREFIX}{name.removesuffix('.weight')}"
            at = torch.stack([flat // columns, flat % columns])
            tensors[f"{prefix}.shira_indices"], tensors[f"{prefix}.shira_weight"] = at.int(), d
        config.save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return [f"r = {r}"]

    return write


def _differences(values: Tensor, weight: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices, int64, and differences, fp32, that added to `weight` give `values`."""
    flat = indices.long()
    base = read_whole([(weight, flat)])[0].cpu().to(values.dtype)
    d = (values.double() - base.double()).float()
    is_other = _bits(_added(base, d)) != _bits(values)
    again, to_zero = flat[is_other], -base[is_other].float()
    rest = values[is_other].float()
    # Half of the least number of 16 bits is one in fp32, and rounds to the zero of its sign.
    tiny = torch.finfo(values.dtype).smallest_normal * torch.finfo(values.dtype).eps / 4
    is_zero = (rest == 0) & torch.signbit(rest)
    rest = torch.where(is_zero, torch.tensor(-tiny, dtype=torch.float32), rest)
    d[is_other] = to_zero
    return torch.cat([flat, again]), torch.cat([d, rest])


def _added(base: Tensor, differences: Tensor) -> Tensor:
    """As torch adds a sparse fp32 tensor to a dense one."""
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    return (wide + differences).to(base.dtype)


def _bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def shira_to_delta(config: ShiraConfig, folder: str, base: str | None = None) -> Delta:
    """Read a SHiRA adapter of this configuration, a folder or an id of the Hub, as a delta.

    ``base`` is its base model, a folder or Hub name; default: the one it names. A ValueError where
    the adapter is damaged, has whole modules beside its entries, or entries that the base has not.
    """
    tensors = load_peft_weights(folder, device="cpu")
    end = ".shira_weight"
    modules = [key.removesuffix(end) for key in tensors if key.endswith(end)]
    own = {f"{module}.shira_{part}" for module in modules for part in ("weight", "indices")}
    if others := sorted(tensors.keys() ^ own):
        raise ValueError(
            f"{folder} has {others[0]}, or lacks it, which is not SHiRA's entries alone: "
            "merge it with peft."
        )
    if (base := base or config.base_model_name_or_path) is None:
        raise ValueError(f"{folder} does not name its base: pass --model_name_or_path.")
    revision = config.revision if base == config.base_model_name_or_path else None
    found = map_model(base, revision)
    indices, values, weights = {}, {}, {}
    for module in modules:
        name = f"{module.removeprefix(_PREFIX)}.weight"
        if (in_files := name_in_files(name, found)) is None:
            raise ValueError(f"{folder} has entries of {name}, which {base} does not have.")
        weight = found[in_files]
        at, d = tensors[f"{module}.shira_indices"], tensors[f"{module}.shira_weight"]
        flat = _flat(name, at, d, weight)
        indices[name], before, values[name] = _merged(flat, d.float(), weight)
        weights[name] = WeightInfo.of(weight.shape, before)
    mask = Mask(
        indices=indices,
        weights=weights,
        base_model=base,
        revision=revision,
        method="shira",
        settings={"r": config.r, "mask_type": config.mask_type, "random_seed": config.random_seed},
        fingerprints=fingerprints(found),
    )
    return Delta(mask=mask, values=values)


def _flat(name: str, at: Tensor, d: Tensor, weight: Tensor) -> Tensor:
    """Flat indices, int64 [n], of a file's rows and columns; a ValueError says what is wrong."""
    n = d.numel()
    if weight.dim() != 2 or at.shape != (2, n) or d.dim() != 1 or not d.is_floating_point():
        raise ValueError(
            f"The entries of {name} are indices of shape {tuple(at.shape)} and {n} differences, "
            f"for a weight of shape {tuple(weight.shape)}: the adapter is damaged or another's."
        )
    rows, columns = at.long().unbind()  # fp32, where a Windows wrote them
    if n and min(int(rows.min()), int(columns.min())) < 0:
        raise ValueError(f"The entries of {name} have negative indices: the adapter is damaged.")
    if n and not (int(rows.max()) < weight.shape[0] and int(columns.max()) < weight.shape[1]):
        raise ValueError(
            f"The entries of {name} lie outside of its shape {tuple(weight.shape)} in the base: "
            "the adapter is of another one."
        )
    return rows * weight.shape[1] + columns


def _merged(flat: Tensor, d: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the entries, ascending and once each: indices, the base's values, the merged ones."""
    index, place = flat.unique(return_inverse=True)
    before = weight.reshape(-1)[index]
    wide = before.to(torch.promote_types(before.dtype, torch.float32))
    merged = wide.index_add(0, place, d.to(wide.dtype))
    return index.to(index_dtype(weight.numel())), before, merged.to(before.dtype)
