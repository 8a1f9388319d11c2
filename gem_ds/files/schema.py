"""A dataclass from JSON that somebody may have damaged: types, bounds, no unknown fields.

Types are strict (true is no number, "3" neither), and numbers finite. Bounds stand at the fields,
as pydantic's `Field`.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")

#: Of a class that `from_json` makes, as its ``__pydantic_config__``.
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def from_json(cls: type[T], text: str | bytes) -> T:
    """An object of a dataclass from JSON; a ValueError names the first field at fault."""
    try:
        return TypeAdapter(cls).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from error
