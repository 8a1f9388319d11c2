"""The final answer: the table of judgements, exactness, and time that grows with the text only."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.evaluate.final_answer import final_answer
from tests.final_answers import MISREAD, PLACED, UNFORESEEN, WRITTEN


def value_of(text: str) -> Fraction | None:
    found = final_answer(text)
    return None if found is None else found.value


@pytest.mark.parametrize(("text", "expected"), [*WRITTEN, *PLACED, *UNFORESEEN])
def test_an_answer_is_read_as_a_careful_person_reads_it(text, expected):
    assert value_of(text) == (None if expected is None else Fraction(expected))


@pytest.mark.xfail(strict=True, reason="a known limit")
@pytest.mark.parametrize(("text", "expected"), MISREAD)
def test_what_is_known_to_be_misread(text, expected):
    assert value_of(text) == Fraction(expected)


#: Those that stay what they are behind other words.
MOVABLE = [
    (text, expected)
    for text, expected in WRITTEN
    if expected is not None and "####" not in text and not text.startswith("- ")
]


@pytest.mark.parametrize(("text", "expected"), MOVABLE)
@pytest.mark.parametrize("lead", ["#### ", "The answer is ", "So it is "])
def test_a_number_is_the_same_wherever_it_stands(text, expected, lead):
    assert value_of(f"2 + 2 = 4.\n{lead}{text}\n") == Fraction(expected)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("#### 18", "hash-marks"),
        (r"\boxed{18}", "boxed"),
        ("The answer is 18.", "announced"),
        ("18 is the answer.", "announced"),
        ("#### 17. Wait, it is 18.", "correction"),
        ("9 * 2 = 18", "conclusion"),
    ],
)
def test_the_rule_that_found_the_answer_is_named(text, rule):
    found = final_answer(text)
    assert found is not None
    assert (found.value, found.rule) == (18, rule)


@settings(max_examples=80, deadline=None)
@given(
    value=st.decimals(-(10**12), 10**12, places=2),
    lead=st.sampled_from(["#### ", "so it is ", r"\boxed{", "The answer is **"]),
    tail=st.sampled_from(["", ".", " dollars.", "}", "**\n", "%"]),
)
def test_a_number_is_read_however_it_is_written(value, lead, tail):
    expected = Fraction(value)
    for written in (f"{value:f}", f"{value:,f}", f"{value:f}0"):
        assert value_of(f"12 - 3 = 9\n{lead}{written}{tail}") == expected, written


@settings(max_examples=50, deadline=None)
@given(
    whole=st.integers(0, 10**6), above=st.integers(1, 99), below=st.integers(1, 99), data=st.data()
)
def test_fractions_are_exact(whole, above, below, data):
    expected = whole + Fraction(above, below)
    form = data.draw(
        st.sampled_from(["{} {}/{}", r"{}\frac{{{}}}{{{}}}", r"\boxed{{{} {}/{}}}", "${} {}/{}$"])
    )
    assert value_of(form.format(whole, above, below)) == expected


def test_numbers_beyond_a_float_are_told_apart():
    long = "9" * 6000  # beyond what int() takes from a string
    assert value_of(f"#### {long}") == 10**6000 - 1
    assert value_of("#### 10000000000000000000001") == 10**22 + 1
    assert value_of("#### 0.1000000000000000000001") == Fraction(10**21 + 1, 10**22)
    assert value_of("#### 1e400") == 10**400


@pytest.mark.parametrize(
    "text", ["9" * 20_000, "1e99999999999", "10^99999999999", "99^9999", "0^-1", "1e-99999"]
)
def test_a_number_too_long_to_be_an_answer_is_none(text):
    assert value_of(f"#### {text}") is None
    assert value_of(f"#### 7\n\n{text}") == 7


HARSH = st.text("#$0123456789-.,/ \n%^{}()\\*=:é½٣'x\x00\ud800", max_size=60)
WORDS = st.lists(
    st.sampled_from(
        ["####", r"\boxed{", "The answer is ", "Wait, ", "Question:", "**", "<<", r"\frac{1}", "1"]
    )
    | st.text(max_size=5),
    max_size=12,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=HARSH | WORDS)
def test_no_text_is_too_strange(text):
    found = final_answer(text)
    assert found is None or (isinstance(found.value, Fraction) and found.rule)


UNITS = [
    *("9", "1,", "1.", "1:", "11,", "111,", "111.", "1 ", "123 ", "1'", "1_", "a1", "1x", "x1"),
    *("#### ", "answer ", "answer: ", "answer is ", " is the answer ", r"\boxed{", r"\boxed{1"),
    *(r"\frac{1}{", r"\frac{1,", "<<1", "<<", "{", "(", ")(", "(4)", "\n", "  ", "\t", " \n"),
    *("**", "** 1", "Wait, ", "No. ", "Question:", "- ", "-1", "$", "$-", "1/", "1 / ", "1^", "1e"),
    *("1e9", "½", "٣", "1 or ", "of the ", "5 of ", "from the 5 ", "1 times as ", "=", "1= ", "é"),
    *(
        "\n1. x",
        "1)",
        r"\text",
        r"\,",
        "{,}",
        "thousand",
        "1 thousand ",
        "1 hours ",
        "\x00",
        "1st ",
    ),
]


@pytest.mark.parametrize("lead", ["", "#### 5. "])
def test_time_grows_with_the_text_and_not_with_its_square(lead):
    """A pattern that backtracks would take minutes: each text is 4 times as long as an output."""
    for unit in UNITS:
        text = lead + unit * (4_000 // len(unit))
        started = time.process_time()
        final_answer(text)
        assert time.process_time() - started < 1, f"repeated {unit!r}"
