"""What a DeepSpeed JSON says, key by key: refused, told or taken as the table has it.

A key that the table does not have is refused: DeepSpeed passes over unknown ones at the top, and a
misspelt ``zero_optimization`` would mean stage 0. Names that begin with ``_`` or ``//`` are those
of comments.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from gem_ds.distributed.zero_table import SAVING, TABLE, Ignored, Refused, Taken, Treatment

#: How names of keys begin that say nothing.
COMMENTS = ("_", "//")


class Entry(NamedTuple):
    """One line of a DeepSpeed JSON."""

    section: str  # "" for the top
    key: str
    value: Any
    treatment: Treatment | None  # None: the table does not have it

    @property
    def path(self) -> str:
        """Its name with its section's."""
        return f"{self.section}.{self.key}" if self.section else self.key


def entries(config: Mapping[str, Any]) -> Iterator[Entry]:
    """The lines of a configuration that the table is about, section by section; no nulls.

    Raises:
        ValueError: a section is not an object.
    """
    for section, known in TABLE.items():
        values: Any = config
        for name in filter(None, section.split(".")):
            values = {} if values.get(name) is None else values[name]
            if not isinstance(values, dict):
                raise ValueError(f"{section} in the DeepSpeed JSON must be an object.")
        for key, value in values.items():
            if value is not None and not key.startswith(COMMENTS):
                treatment = known.get(key) or known.get(f"stage3_{key}")
                yield Entry(section, key, value, treatment)


def asks(entry: Entry) -> bool:
    """Whether a line that is passed over or refused asks for anything."""
    nothing = entry.treatment.nothing if isinstance(entry.treatment, Ignored | Refused) else None
    if entry.value == nothing:
        return False
    return nothing is True or _asks(entry.value)


def _asks(value: Any) -> bool:
    """Whether a value is on: not false, empty, "none", or a section that is off or all of that."""
    if isinstance(value, dict):
        return value.get("enabled") is not False and any(map(_asks, value.values()))
    return value not in (None, False, 0, "", "none", [])


def check_keys(config: Mapping[str, Any]) -> None:
    """Refuse keys that the table does not have, and values that DeepSpeed would not take.

    "auto" passes for any value.
    """
    if unknown := [e for e in entries(config) if e.treatment is None]:
        told = _listed(map(_with_nearest, unknown))
        raise ValueError(f"DeepSpeed does not know {told}: rename or remove it in the JSON.")
    for entry in entries(config):
        taken = entry.treatment
        if isinstance(taken, Taken) and entry.value != "auto" and not taken.holds(entry.value):
            found = shown(entry.value)
            raise ValueError(
                f"{entry.path} in the DeepSpeed JSON must be {taken.words}, not {found}."
            )


def refuse_requests(config: Mapping[str, Any]) -> None:
    """Refuse what a training cannot honour, all of it in one sentence."""
    refused = [
        (entry.path, entry.treatment.why)
        for entry in entries(config)
        if isinstance(entry.treatment, Refused) and asks(entry)
    ]
    if len(refused) == 1:
        raise ValueError(f"Remove {refused[0][0]} from the DeepSpeed JSON: {refused[0][1]}.")
    if refused:
        told = _listed(f"{path} ({why})" for path, why in refused)
        raise ValueError(f"Remove from the DeepSpeed JSON: {told}.")


def told_ignored(config: Mapping[str, Any]) -> str | None:
    """One sentence on what of a configuration decides nothing; None if there is nothing such."""
    reasons: dict[str, list[str]] = {}
    for entry in entries(config):
        if isinstance(entry.treatment, Ignored) and asks(entry):
            reasons.setdefault(entry.treatment.why, []).append(entry.path)
    told = [f"{' and '.join(paths)} ({why})" for why, paths in reasons.items()]
    return f"Of the DeepSpeed JSON this is passed over: {'; '.join(told)}" if told else None


def taken_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration that asks for nothing refused: what of it DeepSpeed gets.

    Names that DeepSpeed deprecates are its present ones in it.
    """
    kept: dict[str, Any] = {}
    for entry in entries(config):
        if not isinstance(entry.treatment, Taken):
            continue
        section = kept
        for name in filter(None, entry.section.split(".")):
            section = section.setdefault(name, {})
        key = entry.key if entry.key in TABLE[entry.section] else f"stage3_{entry.key}"
        section[key] = {} if entry.path in TABLE else copy.deepcopy(entry.value)
    zero = kept.get("zero_optimization", {})
    for key in SAVING:
        zero.pop(key, None)
    place = {"device": "cpu", "pin_memory": zero.pop("cpu_offload_use_pin_memory", True)}
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if zero.pop(old, False):
            zero.setdefault(new, dict(place))
    return kept


def _with_nearest(entry: Entry) -> str:
    near = get_close_matches(entry.key, TABLE[entry.section], n=1, cutoff=0.75)
    return f"{entry.path} (meaning {near[0]}?)" if near else entry.path


def shown(value: Any) -> str:
    """A value as JSON writes it; of an object or a long value only what it is."""
    text = json.dumps(value)
    return text if len(text) <= 60 else "an object" if isinstance(value, dict) else "a long value"


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
