r"""The numbers in a text as people write them, each with its exact value.

    $1,234.50   1 000   1.234,50   -\$5   3 1/2   \frac{3}{4}   50%   10^3   1e3   2 million   ٣

Values are as stated: a percentage is the number before its sign, a unit does not count, and nothing
is calculated but powers and fractions. Digits glued to a word (x2, H2O) are passed over. What is
written in digits but is no single number is found without a value: times and ratios (3:30, 2:1),
versions (1.2.3), the parts of an unfinished calculation, a range or a date (5 + 3, 3-5, 2020-12-5).
Nor has a comma with one or two digits behind it (2,5) a value: it may be a decimal or a list.
Behind points that group thousands it can only be a decimal.

Every pattern here runs in time linear in the text: its parts are of bounded length, or cannot be
divided in more than one way.
"""

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

_MAX_DIGITS = 10_000  # of a number; more are no answer, and take long to convert

_TRANSLATED: dict[int, str] = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2013\ufe63", "-"),  # minus, hyphens, en dash
        **dict.fromkeys("\u00a0\u202f\u2009\u2007", " "),  # spaces that group digits
        **{chr(0xFF01 + i): chr(0x21 + i) for i in range(94)},  # full-width ASCII
        "\u2044": "/",
        "\u2019": "'",
    }
)
_LATEX = [
    (r"\\(?:text|mathrm|mathbf|mathit|math|mbox)[a-z]{0,9}(?=\{)", ""),
    (r"\\[dtc]?frac\s{0,2}\{([0-9][0-9,.]{0,40})\}\s{0,2}\{?([0-9]{1,40})\}?", r"\1/\2"),
    (r"\\[dtc]?frac\s{0,2}([0-9])\s?\{?([0-9])\}?", r"\1/\2"),
    (r"\{,\}", ","),
    (r"\\!", ""),
    (r"\\[,;: ]", " "),
    (r"\\([$%#&])", r"\1"),
    (r"\\(?:times|cdot|div)(?![a-z])", "\N{MULTIPLICATION SIGN}"),
]
_MIXED_LATEX = re.compile(r"(?<=[0-9])(?=\\[dtc]?frac)")
_CALCULATOR_MARK = re.compile(r"<<[^<>\n]{0,200}>>")  # GSM8K's <<48/2=24>> before the 24

_SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
_SCALES = {"k": 10**3, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_NUMBER = re.compile(
    rf"""
    (?P<junk>
        (?! (?:Rs|USD|EUR|GBP|INR)[0-9] ) [A-Za-z]++ _? [0-9] [A-Za-z0-9_.]*+  # x2, H2O
      | [0-9]++ (?: :[0-9]++ )++                                               # 3:30
      | [0-9]++ \.[0-9]++ (?: \.[0-9]++ )++ (?!,[0-9])                         # 1.2.3
      | [0-9]++ [xX] [0-9] [0-9.]*+                                            # 3x4
      | (?:Rs|USD|EUR|GBP|INR) (?=[0-9])
      | [A-Za-z]++ \.?
    )
  | (?P<sign> (?<![A-Za-z0-9_)\]}}%]) (?<![0-9)\]}}%]\ ) - | (?<=[\#=]\ ) -\ (?=[$€£0-9.]) )?
    (?: [$€£¥₹₩₽] \ ? (?P<inner_sign> - )? )?
    (?: (?P<whole> [0-9]{{1,40}}+ ) \ {{1,2}} (?= [0-9]{{1,40}}+ / [0-9] ) )?
    (?P<digits>
        [0-9]{{1,3}} (?: \. [0-9]{{3}} ){{1,12}}+ , [0-9]{{1,2}} (?![0-9])            # 1.234,50
      | [0-9]{{1,2}} (?: , [0-9]{{2}} ){{1,8}} , [0-9]{{3}} (?![0-9]) (?: \.[0-9]++ )?  # 1,23,456
      | [0-9]{{1,3}} (?: (?P<separator> [,'_\ ] ) [0-9]{{3}} (?![0-9]) )
                     (?: (?P=separator) [0-9]{{3}} (?![0-9]) )*+ (?: \.[0-9]++ )?
      | [0-9]++ (?: \.[0-9]++ )?
      | \.[0-9]++
    )
    (?P<comma> (?: , [0-9]{{1,2}} (?![0-9]) )++ )?                                # 2,5
    (?: \ ?/\ ? (?P<denominator> [0-9]++ ) )?
    (?: [eE] (?P<exponent> [+-]?[0-9]++ ) (?![0-9A-Za-z]) )?
    (?: \ ?[x\xd7*\xb7]\ ?10
        (?: \^\{{?(?P<ten> -?[0-9]++ )\}}? | (?P<raised_ten> [{_SUPERSCRIPTS}]++ ) ) )?
    (?: \^\{{?(?P<power> -?[0-9]++ )\}}? | (?P<raised> [{_SUPERSCRIPTS}]++ ) )?
    (?: \ ?(?P<scale> thousand | million | billion | trillion ) (?![a-z])
      | (?P<kilo> [kK] ) (?![A-Za-z]) )?
    """,
    re.VERBOSE,
)
#: What joins two numbers to something that is none: a calculation, a range, a date, a choice.
_JOINT = re.compile(
    r"[)\]}]{0,3}[ \t]{0,2}(?:[-+*/^xX\xd7\xf7\xb7]"
    r"|\*\*|(?<=\))(?=\()|or)[ \t]{0,2}[(\[{]{0,3}"
)
_LONGEST_JOINT = 12
#: One quantity in two units, which is no single number: 2 hours and 30 minutes.
_FIRST_UNIT = re.compile(r" ?(?:hours?|hrs?|h|feet|ft),? (?:and )?")
_SECOND_UNIT = re.compile(r" ?(?:minutes?|mins?|m|inch|inches|in)\b")
_DOLLARS_AND_CENTS = re.compile(r"(?<![0-9.])([0-9]{1,15}) dollars? and ([0-9]{1,2}) cents?\b")
#: A sign in words; after a number it would be a subtraction.
_MINUS_WORD = re.compile(r"(?:^|[^0-9)%a-z ])[ ]?\b(?:minus|negative) $|[a-z] (?:minus|negative) $")


@dataclass(frozen=True)
class Number:
    """A number in a text, sign and currency included; a unit or percent sign is not."""

    start: int
    end: int
    value: Fraction | None  # none of what is no single number, or too long to be an answer


def cleaned(text: str) -> str:
    r"""The text with all digits, signs, spaces and the LaTeX of numbers written in one way."""
    if not text.isascii():
        text = "".join(map(_plain, text.translate(_TRANSLATED)))
        text = re.sub(r"(?<=[0-9])\x00", " ", text).replace("\x00", "")
    text = _CALCULATOR_MARK.sub("", text)
    text = _DOLLARS_AND_CENTS.sub(lambda m: f"{m[1]}.{m[2]:0>2} dollars", text)
    if "\\" in text or "{" in text:
        text = _MIXED_LATEX.sub(" ", text)
        for pattern, replacement in _LATEX:
            text = re.sub(pattern, replacement, text)
    return text


def find_numbers(text: str) -> list[Number]:
    """The numbers of a cleaned text, in their order."""
    numbers: list[Number] = []
    for match in _NUMBER.finditer(text):
        junk = match["junk"]
        if junk is not None and not "0" <= junk[0] <= "9":
            continue
        value = _value(match) if junk is None else None
        number = Number(match.start(), match.end(), value)
        if numbers and number.value is not None and _are_joined(text, numbers[-1], number):
            numbers[-1] = Number(numbers[-1].start, numbers[-1].end, None)
            number = Number(number.start, number.end, None)
        numbers.append(number)
    return numbers


def _are_joined(text: str, first: Number, second: Number) -> bool:
    if second.start - first.end > _LONGEST_JOINT:
        return False
    if _FIRST_UNIT.fullmatch(text, first.end, second.start):
        return _SECOND_UNIT.match(text, second.end) is not None
    return _JOINT.fullmatch(text, first.end, second.start) is not None


def _plain(character: str) -> str:
    """A digit of any script in ASCII; ½ as 1/2, after a mark where a mixed number may begin."""
    if character.isascii():
        return character
    if (digit := unicodedata.decimal(character, None)) is not None:
        return str(digit)
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return "\x00" + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    return character


def _value(match: re.Match[str]) -> Fraction | None:
    """The exact value of a number; None where it has none that could be an answer."""
    parts = {  # powers in plain digits
        name: unicodedata.normalize("NFKC", part)
        for name, part in match.groupdict().items()
        if part
    }
    if "comma" in parts or match.end() - match.start() > _MAX_DIGITS:
        return None
    digits, denominator = parts["digits"], parts.get("denominator", "1")
    if re.fullmatch(r"[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]{1,2}", digits):
        digits = digits.replace(".", "").replace(",", ".")
    value = Fraction(Decimal(re.sub(r"[,'_ ]", "", digits)))
    if not denominator.strip("0"):
        return None
    value /= Fraction(Decimal(denominator))
    value += Fraction(Decimal(parts.get("whole", "0")))
    for exponent in (parts.get(name, "0") for name in ("exponent", "ten", "raised_ten")):
        if len(exponent) > 5 or abs(int(exponent)) > _MAX_DIGITS:
            return None
        value *= Fraction(10) ** int(exponent)
    if power := parts.get("power") or parts.get("raised"):
        size = len(digits) + len(parts.get("denominator", ""))
        if len(power) > 5 or abs(int(power)) * size > _MAX_DIGITS or not value:
            return None
        value **= int(power)
    value *= _SCALES.get((parts.get("scale") or parts.get("kilo", "")).lower(), 1)
    before = match.string[max(0, match.start() - 12) : match.start()]
    is_negative = "sign" in parts or "inner_sign" in parts or _MINUS_WORD.search(before)
    return -value if is_negative else value
