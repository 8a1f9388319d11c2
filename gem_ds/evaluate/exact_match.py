r"""Whether an output gives a reference answer, under three rules, and what the counts are worth.

    strict-match        the first `#### (\-?[0-9\.\,]+)` of the output
    flexible-extract    the last `(-?[$0-9.,]{2,})|(-?[0-9]+)` of the output
                        each compared as a string with the reference, after both have lost commas,
                        dollar signs, everything through `#### ` and one trailing full stop
    numeric             the value of the final answer, exactly (`evaluate.final_answer`): 29.00 = 29

The first two are the filters and the metric of the community harness (lm-evaluation-harness, task
gsm8k), bit for bit, and bear its names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gem_ds.evaluate.final_answer import final_answer
from gem_ds.evaluate.pass_at_k import bootstrap_interval

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_NOT_FOUND = "[invalid]"  # the harness's word


@dataclass(frozen=True, kw_only=True)
class Match:
    """Whether an output is right under each of the three rules, and what found its number."""

    strict_match: bool
    flexible_extract: bool
    numeric: bool
    rule: str | None = field(default=None, compare=False)


#: The rules by the names under which they are reported, and their fields of `Match`.
RULES = {name.replace("_", "-"): name for name in ("strict_match", "flexible_extract", "numeric")}


def compare(output: str, answer: str) -> Match:
    """Judge what a model wrote; `answer` is the dataset's, or the number at its end alone."""
    reference = _normalised(answer)
    strict = _STRICT.search(output)
    flexible = [match[0] for match in _FLEXIBLE.finditer(output)]
    found, wanted = final_answer(output), final_answer(answer)
    return Match(
        strict_match=_normalised(strict[1] if strict else _NOT_FOUND) == reference,
        flexible_extract=_normalised(flexible[-1] if flexible else _NOT_FOUND) == reference,
        numeric=found is not None and wanted is not None and found.value == wanted.value,
        rule=None if found is None else found.rule,
    )


def is_reference(answer: str) -> bool:
    """Whether an answer ends as the dataset's do, so that an output can match it."""
    return _STRICT.search(answer) is not None


def tally(matches: Sequence[Match], total: int) -> dict[str, dict[str, Any]]:
    """By rule, how many of `total` problems are right, their share and its interval."""
    table: dict[str, dict[str, Any]] = {}
    for rule, name in RULES.items():
        values = [float(getattr(match, name)) for match in matches] + [0.0] * (total - len(matches))
        table[rule] = {
            "correct": int(sum(values)),
            "total": total,
            "accuracy": sum(values) / total,
            "confidence_interval": list(bootstrap_interval(values)),
        }
    return table


def summary(exact_match: Mapping[str, Mapping[str, Any]]) -> str:
    """The result line, from `tally`."""
    parts = [
        f"{rule} {counts['correct']}/{counts['total']} = {100 * counts['accuracy']:.1f} %"
        for rule, counts in exact_match.items()
    ]
    return "exact match: " + ", ".join(parts)


def _normalised(text: str) -> str:
    """What the harness does to prediction and reference before it compares them."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()
