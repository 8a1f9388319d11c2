r"""The answer at which a text arrives, read as a careful person reads it, and how it was found.

In this order, the first that finds a number:

    correction    what follows an announced answer after "Wait, ...", "I made a mistake", "Oops"
    hash-marks    #### 18
    boxed         \boxed{18}
    announced     the answer is 18; Answer: 18; 18 is the final answer
    conclusion    nothing is announced: the last number of the last sentence that has one

Of several announcements the last one counts. A text that runs on into another conversation ends
where that begins (`evaluate.run_on`). Within a sentence, the answer comes before a number that only
stands in relation to it: "12 eggs left *from the 16*", "8, *not 9*", "15, *5 more than* Bob",
"*Step 2:* ...", "$18 from eggs *at $2 each*"; and a result after `=` and a number in bold come
before others.

This is a reading of words, so it can be fooled; `tests/evaluate/final_answers.toml` and
`run_ons.toml` say what it is known to read. Number words ("eighteen") are not read.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from gem_ds.data.numbers import Number, cleaned, find_numbers
from gem_ds.evaluate.run_on import end_of_answer

_ANNOUNCEMENT = re.compile(
    r"(?P<hash>\#{4,8})"
    r"|(?P<boxed>\\f?boxed\s{0,2}\{)"
    r"|(?P<after>\bis\ (?:the|my|our)\ (?:[a-z]{1,12}\ )?answer\b)"
    r"|(?P<before>\b(?:answer|ans)\b[^.\n0-9:=\#\\]{0,40}?(?:\bis\b|\bbe\b|\bequals\b|:|=|\bof\b))",
    re.IGNORECASE | re.VERBOSE,
)
_KINDS = {"hash": "hash-marks", "boxed": "boxed", "after": "announced", "before": "announced"}
#: What may stand between an announcement and its number.
_LEAD = re.compile(
    r"[\s*_:`'\"~({\[\\$]*+(?:(?:approximately|about|exactly|around|roughly|just|only|simply|"
    r"USD|EUR|GBP|INR|Rs\.?|[A-Za-z]{1,12}\s?=)[\s*_:`'\"~({\[\\$=]*+)?",
    re.IGNORECASE,
)
#: From a first number to the result that it leads to: 16 eggs minus 4 eggs = 12 eggs.
_UP_TO_RESULT = re.compile(r"(?:(?!since|because|\bas\b|\bso\b)[^=,;(\n]){0,80}=", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[.!?](?=[\s\"'*)\]]|$)|。")
_SECOND_THOUGHT = re.compile(
    r"(?:^|[.!?:\n])\s{0,3}(?:but\s|oh\s|hmm,?\s)?"
    r"(?:wait|oops|sorry|correction|actually|no|hold on)\b\s?[,.:!-]"
    r"|\bmade an? (?:mistake|error)\b|\bscratch that\b|\bi meant\b"
    r"|\blet me (?:correct|redo|recalculate|recompute|fix)\b",
    re.IGNORECASE,
)
#: A heading that counts a step, with what the step says below it: #### 2. Compute the money
_COUNTED = r"(?i:step|part|day|week|month|year|phase|stage|section|case|round|method) [0-9]{1,2}"
_TITLE = r"[*_]{0,2} {1,3}[*_]{0,2}[A-Z][^\n.!?]{0,80}"
_HEADING = re.compile(
    rf"[ *_(]{{0,5}}(?:{_COUNTED}[*_:]{{0,3}}|(?:{_COUNTED}|[0-9]{{1,2}})(?:[.):]| -){_TITLE})\n"
)

#: What stands before a number that is no answer, but in relation to one.
_DETERMINER = r"(?:(?:the|all|her|his|their|its|our|my|those|these|about|only|original) ){0,2}"
_BOUND_BEFORE = re.compile(
    r"\b(?:not|isn't|wasn't|than|instead of|from|out of|per|every|each|at|after|before|within"
    r"|during|until|since|on|among|between|over|under|by"
    r"|(?<!result )(?<!results )(?<!resulting )in"
    r"|(?<!left )(?<!up )(?<!ends )(?<!ended )(?<!remains )with"
    rf"|of(?= [a-z])) {_DETERMINER}$"
    r"|[0-9] (?:[a-z]{1,12} ){0,2}of $"
    r"|'s $"
    r"|\b(?:day|week|month|year|room|page|level|grade|chapter) #?$"
    r"|\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}\.? $",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"\b(?:step|problem|question|example|part|exercise|case|option|figure|table) #?$",
    re.IGNORECASE,
)
_BOUND_BEFORE_BUT_MONEY = re.compile(rf"\bfor {_DETERMINER}$", re.IGNORECASE)
#: A rate is the answer where its sentence has no other number.
_RATE = re.compile(r"\s?(?:each|apiece|a piece|per)\b|\s?/\s?[a-z]", re.IGNORECASE)
_BOUND_AFTER = re.compile(
    r"(?:st|nd|rd|th)\b"
    r"|\s?times (?:as|more|the|what)\b"
    r"|(?: [a-z]{1,12}){0,2} (?:more|less|fewer|older|younger|taller|shorter|longer|higher|lower)"
    r"(?: [a-z]{1,12}){0,3} than\b",
    re.IGNORECASE,
)
_MONEY = re.compile(r"\s?(?:dollars?|cents?|euros?|pounds?|rupees?)\b", re.IGNORECASE)
_LINE_START = re.compile(r"(?:^|\n)[ \t*(]{0,9}$")
_LABEL_END = re.compile(r"[.)][*]{0,2}[ \t]+\S")
_BOLD_END = re.compile(r"[^*\n]{0,25}\*\*")
_WINDOW = 60  # characters before a number that say what part it plays
_NEAREST = 32  # numbers of a sentence among which an announced answer is; a text may repeat both


@dataclass(frozen=True)
class FinalAnswer:
    """What a text gives as its answer: the exact value, and the rule that found it."""

    value: Fraction
    rule: str


def final_answer(text: str) -> FinalAnswer | None:
    """The answer at which a text arrives, or None if it has no number; raises nothing."""
    number, rule = _Reading(text).answer()
    if number is None or number.value is None:
        return None
    return FinalAnswer(number.value, rule)


class _Reading:
    """A text, the numbers in it, and where its sentences end."""

    def __init__(self, text: str) -> None:
        text = cleaned(text)
        numbers = find_numbers(text)
        first = numbers[0].start if numbers else len(text)
        self.text = text[: end_of_answer(text, first)]
        self.numbers = [number for number in numbers if number.end <= len(self.text)]
        self._starts = [number.start for number in self.numbers]
        self._ends = [match.start() for match in _SENTENCE_END.finditer(self.text)]

    def answer(self) -> tuple[Number | None, str]:
        for announcement in reversed(list(_ANNOUNCEMENT.finditer(self.text))):
            kind = str(announcement.lastgroup)
            if (number := self._announced(announcement, kind)) is not None:
                thought = _SECOND_THOUGHT.search(self.text, number.end)
                later = self._between(thought.end(), len(self.text)) if thought else []
                corrected = self._conclusion(later)
                return (number, _KINDS[kind]) if corrected is None else (corrected, "correction")
        return self._conclusion(self.numbers), "conclusion"

    def _announced(self, announcement: re.Match[str], kind: str) -> Number | None:
        """The number that an announcement is about, if there is one; it may have no value."""
        if kind == "after":
            place = bisect_left(self._ends, announcement.start())
            start = self._ends[place - 1] + 1 if place else 0
            return self._conclusion(self._between(start, announcement.start())[-_NEAREST:])
        heading = _HEADING.match(self.text, announcement.end()) if kind == "hash" else None
        if heading is not None and self._starts and self._starts[-1] >= heading.end():
            return None
        lead = _LEAD.match(self.text, announcement.end())
        assert lead is not None, "it matches the empty text"
        end = self._boxed_end(announcement.end()) if kind == "boxed" else self._end(lead.end())
        numbers = self._between(announcement.end(), end)[:_NEAREST]
        stated = [number for number in numbers if number.value is not None]
        if not stated:  # "The answer is 3-5" is an answer, but none that is a number
            return numbers[0] if numbers else None
        if stated[0].start > lead.end():
            number = self._conclusion(numbers)
            assert number is not None, "there are numbers"
            return None if _LABEL.search(self._before(number)) else number
        result = _UP_TO_RESULT.match(self.text, stated[0].end, end)
        later = [n for n in stated if result is not None and n.start >= result.end()]
        return later[0] if later else stated[0]

    def _conclusion(self, numbers: Sequence[Number]) -> Number | None:
        """The last free number of the last sentence that has one; bold ones first, asides last."""
        numbers = [number for number in numbers if number.value is not None]
        last = next((number for number in reversed(numbers) if not self._is_bound(number)), None)
        if last is None:
            return numbers[-1] if numbers else None
        place = bisect_left(self._ends, last.start)
        start = self._ends[place - 1] if place else 0
        free = [n for n in numbers if start <= n.start <= last.start and not self._is_bound(n)]
        plain = [n for n in free if not (self._is_rate(n) or self._is_aside(n))]
        bold = [
            n
            for n in plain
            if self.text.endswith("**", 0, n.start) and _BOLD_END.match(self.text, n.end)
        ]
        return (bold or plain or free)[-1]

    def _is_bound(self, number: Number) -> bool:
        """Whether a number only stands in relation to another, or counts steps, days or lines."""
        before = self._before(number)
        if before.rstrip().endswith("="):
            return False
        if _LABEL.search(before) or _BOUND_BEFORE.search(before):
            return True
        if _BOUND_AFTER.match(self.text, number.end):
            return True
        if _BOUND_BEFORE_BUT_MONEY.search(before):
            written = self.text[number.start : number.end]
            return not (written.strip("0123456789.,- ") or _MONEY.match(self.text, number.end))
        return bool(_LINE_START.search(before) and _LABEL_END.match(self.text, number.end))

    def _is_rate(self, number: Number) -> bool:
        is_result = self._before(number).rstrip().endswith("=")
        return not is_result and _RATE.match(self.text, number.end) is not None

    def _is_aside(self, number: Number) -> bool:
        before = self._before(number)
        opened = before.rfind("(")
        return opened > before.rfind(")") and not before.endswith("\\", 0, opened)

    def _before(self, number: Number) -> str:
        return self.text[max(0, number.start - _WINDOW) : number.start]

    def _between(self, start: int, end: int) -> list[Number]:
        return self.numbers[bisect_left(self._starts, start) : bisect_left(self._starts, end)]

    def _end(self, position: int) -> int:
        """Where the sentence ends in which a position lies."""
        place = bisect_right(self._ends, position)
        return self._ends[place] if place < len(self._ends) else len(self.text)

    def _boxed_end(self, start: int) -> int:
        """Where the brace is closed that has been opened before `start`, if it is soon."""
        depth = 1
        for position in range(start, min(start + 300, len(self.text))):
            depth += {"{": 1, "}": -1}.get(self.text[position], 0)
            if depth == 0:
                return position
        return self._end(start)
