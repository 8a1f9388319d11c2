"""Writing a model's folder as its base's: the weights are other ones, and nothing else is.

    every other file of the base    copied byte by byte: configuration, tokenizer, generation
                                    configuration, templates, processors, code, licence
    each file of weights            the same name, names of tensors and dtypes, as safetensors

transformers is no faithful copyist: version 5 moves `rope_theta` to where version 4 does not look
and names a tokenizer class that it does not know, so the same weights are another model there.

What differs from the base: a dtype that cannot hold the trained values exactly becomes theirs, and
config.json says so; an encoder that got a task head has the names of its new class, and config.json
its labels. Hidden files, subfolders (but `additional_chat_templates`) and weights of other formats
(`.gguf`, `.h5`, ...) stay behind.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedModel, utils
from transformers.core_model_loading import revert_weight_conversion

from gem_ds.errors import refusing
from gem_ds.files.mask import dtype_name
from gem_ds.files.stream import LazyTensor, stream_tensors
from gem_ds.models.weight_files import holds, map_model, map_tensors, weight_files

#: Ends of the names of what holds weights, or an optimizer's state, in any format.
_OF_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx"),
    *(".onnx_data", ".gguf", ".npz", ".index.json"),
)

#: The one subfolder that transformers reads beside the files.
_TEMPLATES = "additional_chat_templates"

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def base_folder(name: str, revision: str | None = None) -> Path:
    """Where a model's files lie: its folder, or the Hub's cache with all but weights in it."""
    if Path(name).is_dir():
        return Path(name)
    weights = [f"*{end}" for end in _OF_WEIGHTS]  # those that were loaded are there already
    with refusing(f"The files of {name} cannot be fetched: {{}}", OSError, ValueError):
        return Path(snapshot_download(name, revision=revision, ignore_patterns=weights))


def write_folder(
    folder: Path,
    base: Path,
    model: PreTrainedModel,
    trained: Mapping[str, Tensor],
    head: Collection[str] = (),
) -> list[str]:
    """Fills `folder`, which exists, with the base's files and the weights `trained`.

    Args:
        folder: Where to write.
        base: The folder that the model was loaded from.
        model: Says what its parameters are called in files; may be partitioned.
        trained: Every parameter, whole, by its name in the model; tied ones once.
        head: Names of those that the base may lack.

    Returns:
        Sentences on what a user of the folder should know; mostly none.

    Raises:
        ValueError: The base's files have no place for a parameter.
    """
    new = _as_in_files(model, trained, set(map_model(str(base))))
    prefix = f"{model.base_model_prefix}."
    dtypes = _write_weights(folder, base, new, lambda name, old: new[name], prefix, head)
    return _write_others(folder, base, dtypes, model if head else None)


def write_changed(
    folder: Path, base: Path, changed: Mapping[str, Callable[[Tensor], Tensor]], dtype: torch.dtype
) -> list[str]:
    """As `write_folder` where the names of the weights that change are those in the base's files.

    ``changed`` has by name what makes of the base's weight the trained one, in the `dtype` of the
    training, whose values the base's dtype has. One weight at a time is in memory.
    """
    shapes = {name: old.shape for name, old in map_model(str(base)).items() if name in changed}
    new = {n: torch.empty(shape, dtype=dtype, device="meta") for n, shape in shapes.items()}
    dtypes = _write_weights(folder, base, new, lambda name, old: changed[name](old))
    return _write_others(folder, base, dtypes, None)


def _write_others(
    folder: Path,
    base: Path,
    dtypes: Collection[tuple[torch.dtype, torch.dtype]],
    with_head: PreTrainedModel | None,
) -> list[str]:
    """Writes all but weights: the base's files, and what config.json must say of the weights."""
    _copy_files(base, folder)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    changes = _labels(with_head, config) if with_head is not None else {}
    notes = []
    if exact := [new for old, new in dtypes if not holds(old, new)]:
        dtype = dtype_name(exact[0])
        changes |= _with_dtype(config, dtype)
        notes.append(f"the base's dtype cannot hold the trained values, so all are {dtype}")
    elif dtypes:
        old, new = (dtype_name(dtype) for dtype in min(dtypes, key=str))
        notes.append(f"the weights are {old} as the base's; loaded in {new} they are those trained")
    if changes != {key: config.get(key) for key in changes}:
        text = json.dumps(config | changes, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
    version = str(config.get("transformers_version", ""))
    if re.match(r"[5-9]|\d\d", version):
        notes.append(
            f"transformers {version} wrote the base's config.json, and versions before 5 may read "
            "it as another model"
        )
    return notes


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The entries of config.json with another dtype, those of its parts included."""
    changed = {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    parts = {key: part for key, part in config.items() if isinstance(part, dict)}
    return changed | {key: {**part, **_with_dtype(part, dtype)} for key, part in parts.items()}


def _labels(model: PreTrainedModel, base: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of a task head, beside what the base's does."""
    config: Any = model.config
    labels = {str(i): label for i, label in config.id2label.items()}
    return {
        "architectures": [type(model).__name__],
        "id2label": labels,
        "label2id": {label: int(i) for i, label in labels.items()},
        **({"problem_type": config.problem_type} if config.problem_type else {}),
        **({"num_labels": len(labels)} if "num_labels" in base else {}),
    }


def _copy_files(base: Path, folder: Path) -> None:
    """Everything but weights; what links point to is copied, as the Hub's cache is made of them."""
    sources = [*base.iterdir(), *(base / _TEMPLATES).glob("*.jinja")]
    for path in sources:
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_OF_WEIGHTS):
            target = folder / path.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def _write_weights(
    folder: Path,
    base: Path,
    new: Mapping[str, Tensor],
    trained: Callable[[str, Tensor], Tensor],
    prefix: str = "",
    head: Collection[str] = (),
) -> set[tuple[torch.dtype, torch.dtype]]:
    """Writes file by file; returns the base's dtypes with those of the training, where they differ.

    What `trained` makes of a name in `new` and the base's weight is `new`'s, which may be on meta.
    """
    index, sources = weight_files(str(base))
    missing = {name: new[name] for name in head if name in new}
    placed: set[int] = set()
    dtypes: set[tuple[torch.dtype, torch.dtype]] = set()
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for source in sources:
        tensors, metadata = map_tensors(source)
        written = {}
        for name, old in tensors.items():
            found = _found(name, new, prefix)
            if found is not None and new[found].shape == old.shape:
                missing.pop(found, None)
                placed.add(new[found].data_ptr())
                dtype = new[found].dtype
                dtypes |= {(old.dtype, dtype)}
                dtype = old.dtype if holds(old.dtype, dtype) else dtype
                make = partial(_merged, old, partial(trained, found, old))
                written[found if head else name] = LazyTensor(dtype, tuple(old.shape), make)
            elif not head:
                written[name] = LazyTensor.of(old)
        if source == sources[-1]:
            written |= {name: LazyTensor.of(tensor) for name, tensor in missing.items()}
            placed |= {tensor.data_ptr() for tensor in missing.values()}
        target = source.with_suffix(".safetensors").name.replace("pytorch_model", "model")
        num_bytes += stream_tensors(folder / target, written, metadata)
        weight_map |= dict.fromkeys(written, target)
    if homeless := [name for name, tensor in new.items() if tensor.data_ptr() not in placed]:
        raise ValueError(
            f"{base} has no place for the weight {homeless[0]!r} in its files: pass the model that "
            "was trained"
        )
    if index is not None:
        about = {**index.get("metadata", {}), "total_size": num_bytes}
        index = {"metadata": about, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / utils.SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
    return {(old, new) for old, new in dtypes if old != new}


def _as_in_files(
    model: PreTrainedModel, trained: Mapping[str, Tensor], names: Collection[str]
) -> Mapping[str, Tensor]:
    """The tensors by the names that files have, or nearly so, and cut as there (experts)."""
    prefix = f"{model.base_model_prefix}."
    own = {parameter: name for name, parameter in model.named_parameters()}
    aliases = model.named_parameters(remove_duplicate=False)  # files may repeat a tied weight
    plain = {alias: trained[own[parameter]] for alias, parameter in aliases}
    converting: Any = model
    if found := getattr(model, "_weight_conversions", None):  # at ZeRO stage 3 all, used or not
        converting._weight_conversions = [each for each in found if each.was_used()]
    converted: dict[str, Tensor] = revert_weight_conversion(model, dict(plain))
    return max(
        (plain, converted), key=lambda each: sum(bool(_found(name, each, prefix)) for name in names)
    )


def _found(name: str, tensors: Mapping[str, Tensor], prefix: str) -> str | None:
    """The name in `tensors` of one in the files; those of a base model alone have no prefix."""
    candidates = (name, prefix + name, name.removeprefix(prefix))
    return next((each for each in candidates if each in tensors), None)


def _merged(old: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """`old` but for the entries where the new, perhaps of fewer digits, is another number."""
    new = make().detach().cpu()
    if old.dtype == new.dtype or not holds(old.dtype, new.dtype):
        return new
    bits = _BITS[new.element_size()]
    return torch.where(old.to(new.dtype).view(bits) == new.view(bits), old, new.to(old.dtype))
