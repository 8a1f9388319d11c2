"""The configuration of the tuner: a mask, and what an adapter's folder records of its base."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType, load_peft_weights
from safetensors import SafetensorError
from torch import Tensor

from gem_ds.errors import refusing
from gem_ds.files.mask import Mask, take_tensors, unpack_mask

#: The method's name among peft's. Their enum is closed, and register_peft_method asks for a member.
GEM = "GEM"

WRAPPED = "base_model.model."  #: what a PeftModel puts before the names of modules


if GEM not in PeftType.__members__:
    _member = str.__new__(PeftType, GEM)
    _member._name_, _member._value_ = GEM, GEM
    PeftType._member_map_[GEM] = PeftType._value2member_map_[GEM] = _member
    PeftType._member_names_.append(GEM)


@dataclass
class GemConfig(PeftConfig):
    """Trains the entries of a mask, and nothing else, of a model that peft wraps.

        model = get_peft_model(model, GemConfig(mask="mask.safetensors"))

    Args:
        mask: The entries: a `gem_ds.Mask`, or the path of a ``mask.safetensors``. A saved adapter
            carries its own, so its configuration has none.
        target_modules: Modules whose entries are trained, where not all of the mask are; names as
            peft matches them, also of projections of experts (``experts.down_proj``), which are
            among ``"all-linear"``. A saved adapter's are those that it has entries of.
        exclude_modules: Modules, or projections of experts, left out of them; of the latter alone
            peft warns that no module was.
        modules_to_save: Modules that are trained whole beside, such as a new head.
        base_weights: Written by the tuner: module, or projection of experts, to shape and dtype of
            its weight (dequantized, if it is quantized) and the digest of its values at the
            entries, by which another base is refused.
        num_entries: Written by the tuner: the same to the number of its entries.
        base_quantization: Written by the tuner: how the base was quantized, if it was.
        fingerprints: Written by the tuner: those of the base's parameters, beyond the entries.
        method: Written by the tuner: how the entries were selected.
        settings: Written by the tuner: the settings of that.
    """

    mask: Mask | str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    base_weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_entries: dict[str, int] = field(default_factory=dict)
    base_quantization: dict[str, Any] | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    method: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[GEM]
        if isinstance(self.mask, str):
            self.mask = Mask.load(self.mask)
        if self.mask is not None:
            self.method, self.settings = self.mask.method, self.mask.settings
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """A saved adapter's, with its mask: the folder's, or one of the Hub by its id.

        So what does not fit a model is known before the model is touched.

        Raises:
            ValueError: In one sentence, what of the adapter is missing or damaged.
        """
        name, options = str(pretrained_model_name_or_path), {"subfolder": subfolder}
        config = super().from_pretrained(name, subfolder, **kwargs)
        if isinstance(config, GemConfig):
            options |= cls._split_kwargs(kwargs)[0]
            config.mask = read_entries(config, name, **options)[0]
        return config

    def count(self, weight: str) -> int:
        """The number of entries of a weight: the mask's, or those that a saved adapter has."""
        if isinstance(self.mask, Mask):
            index = self.mask.indices.get(weight)
            return 0 if index is None else index.numel()
        target = target_of(weight)
        about = self.base_weights.get(target)
        return self.num_entries[target] if about and _weight_of(target, about) == weight else 0

    def to_dict(self) -> dict[str, Any]:
        """What ``adapter_config.json`` holds: all but the mask, which the weights' file has."""
        mask, self.mask = self.mask, None
        try:
            return super().to_dict()
        finally:
            self.mask = mask


def target_of(weight: str) -> str:
    """A weight by the name of its module, or of the projection of experts that it is."""
    return weight.removesuffix(".weight")


def _weight_of(target: str, about: dict[str, Any]) -> str:
    """The weight that a saved adapter knows as a target."""
    return target if len(about["shape"]) > 2 else f"{target}.weight"


def key_of(weight: str, adapter_name: str = "") -> str:
    """Where a weight's entries stand in a model, or in a saved adapter, which has no name."""
    module, _, parameter = weight.rpartition(".")
    parts = module, "gem_entries", adapter_name, "" if parameter == "weight" else parameter
    return ".".join(filter(None, parts))


def read_entries(
    config: GemConfig, name: str, **options: Any
) -> tuple[Mask, dict[str, Tensor], dict[str, Tensor]]:
    """What the weights of a saved adapter, a folder or Hub id, hold by the model's own names.

    Its mask; the values, fp32, by weight; the other tensors, those of `modules_to_save`. A
    ValueError says what is missing or damaged. ``options`` are those of `hf_hub_download`.
    """
    problem = f"The adapter {name} is incomplete or damaged ({{}}): save or copy it again."
    with refusing(problem, OSError, ValueError, RuntimeError, SafetensorError):
        found = load_peft_weights(name, device="cpu", **options)
        rest = {key.removeprefix(WRAPPED): tensor for key, tensor in found.items()}
        weights = {_weight_of(target, w): w for target, w in config.base_weights.items()}
        for weight in weights:  # by the names that they have in a delta's file
            for part in ("indices", "values"):
                if (key := f"{key_of(weight)}.{part}") in rest:
                    rest[f"{weight}.{part}"] = rest.pop(key)
        about = {
            field: getattr(config, field)
            for field in ("revision", "method", "settings", "fingerprints")
        }
        base_model = str(config.base_model_name_or_path)
        mask = unpack_mask(rest, {**about, "weights": weights, "base_model": base_model})
        values = take_tensors(rest, mask.weights, "values")
        for weight, own in values.items():
            if own.shape != mask.indices[weight].shape or not own.isfinite().all():
                raise ValueError(f"the values of {weight} are not one finite number for each entry")
    return mask, values, rest
