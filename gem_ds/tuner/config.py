"""The configuration of the tuner: a mask, and what an adapter's folder records of its base."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from gem_ds.files.mask import Mask

#: The method's name among peft's. Their enum is closed, and register_peft_method asks for a member.
GEM = "GEM"


def _add_peft_type(name: str) -> PeftType:
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
    return PeftType[name]


_add_peft_type(GEM)


@dataclass
class GemConfig(PeftConfig):
    """Trains the entries of a mask, and nothing else, of a model that peft wraps.

        model = get_peft_model(model, GemConfig(mask="mask.safetensors"))

    Args:
        mask: The entries: a `gem_ds.Mask`, or the path of a ``mask.safetensors``. A saved adapter
            carries its own, so its configuration has none.
        target_modules: Modules whose entries are trained, where not all of the mask are; names as
            peft matches them. A saved adapter's are the modules it has entries of.
        exclude_modules: Modules left out of them.
        modules_to_save: Modules that are trained whole beside, such as a new head.
        base_weights: Written by the tuner: module to shape and dtype of its weight (dequantized, if
            it is quantized) and the digest of its values at the entries, by which another base is
            refused.
        num_entries: Written by the tuner: module to the number of its entries.
        base_quantization: Written by the tuner: how the base was quantized, if it was.
        fingerprints: Written by the tuner: those of the mask, of the base beyond the entries.
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
            self.fingerprints = self.mask.fingerprints
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """What ``adapter_config.json`` holds: all but the mask, which the weights' file has."""
        mask, self.mask = self.mask, None
        try:
            return super().to_dict()
        finally:
            self.mask = mask
