"""The final answer: the table of judgements, exactness, and time that grows with the text only."""

import time
import tomllib
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.evaluate.final_answer import final_answer


def judged(tables: dict[str, list]) -> dict[str, list[tuple[str, Fraction | None]]]:
    return {
        part: [(text, None if answer == "none" else Fraction(answer)) for text, answer in rows]
        for part, rows in tables.items()
    }


DATA, RUN_ONS = (
    tomllib.loads(Path(__file__).with_name(name).read_text("utf-8"))
    for name in ("final_answers.toml", "run_ons.toml")
)
RULES, UNITS = DATA.pop("rules"), DATA.pop("units")
TABLE, RUN_ON_TABLE = judged(DATA), judged(RUN_ONS)


def value_of(text: str) -> Fraction | None:
    found = final_answer(text)
    return None if found is None else found.value


@pytest.mark.parametrize(
    ("text", "expected"), [*TABLE["written"], *TABLE["placed"], *TABLE["unforeseen"]]
)
def test_an_answer_is_read_as_a_careful_person_reads_it(text, expected):
    assert value_of(text) == expected


@pytest.mark.parametrize("part", [part for part in RUN_ON_TABLE if part != "misread"])
def test_an_answer_ends_where_another_conversation_begins(part):
    for text, expected in RUN_ON_TABLE[part]:
        assert value_of(text) == expected, text


@pytest.mark.xfail(strict=True, reason="a known limit")
@pytest.mark.parametrize(("text", "expected"), TABLE["misread"] + RUN_ON_TABLE["misread"])
def test_what_is_known_to_be_misread(text, expected):
    assert value_of(text) == expected


@pytest.mark.parametrize("lead", ["#### ", "The answer is ", "So it is "])
def test_a_number_is_the_same_wherever_it_stands(lead):
    movable = [
        (text, expected)
        for text, expected in TABLE["written"]
        if expected is not None and "####" not in text and not text.startswith("- ")
    ]
    assert len(movable) > 100
    for text, expected in movable:
        assert value_of(f"2 + 2 = 4.\n{lead}{text}\n") == expected, text


@pytest.mark.parametrize(("text", "rule"), RULES)
def test_the_rule_that_found_the_answer_is_named(text, rule):
    found = final_answer(text)
    assert found is not None
    assert (found.value, found.rule) == (18, rule)


@settings(max_examples=80)
@given(
    value=st.decimals(-(10**12), 10**12, places=2),
    lead=st.sampled_from(["#### ", "so it is ", r"\boxed{", "The answer is **"]),
    tail=st.sampled_from(["", ".", " dollars.", "}", "**\n", "%"]),
)
def test_a_number_is_read_however_it_is_written(value, lead, tail):
    expected = Fraction(value)
    for written in (f"{value:f}", f"{value:,f}", f"{value:f}0"):
        assert value_of(f"12 - 3 = 9\n{lead}{written}{tail}") == expected, written


@settings(max_examples=50)
@given(
    whole=st.integers(0, 10**6),
    above=st.integers(1, 99),
    below=st.integers(1, 99),
    form=st.sampled_from(["{} {}/{}", r"{}\frac{{{}}}{{{}}}", r"\boxed{{{} {}/{}}}", "${} {}/{}$"]),
)
def test_fractions_are_exact(whole, above, below, form):
    assert value_of(form.format(whole, above, below)) == whole + Fraction(above, below)


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


@pytest.mark.parametrize("lead", ["", "#### 5. "])
def test_time_grows_with_the_text_and_not_with_its_square(lead):
    """A pattern that backtracks would take minutes: each text is 4 times as long as an output."""
    for unit in UNITS:
        text = lead + unit * (4_000 // len(unit))
        started = time.process_time()
        final_answer(text)
        assert time.process_time() - started < 1, f"repeated {unit!r}"


HARSH = st.text("#$0123456789-.,/ \n%^{}()\\*=:é½٣'x\x00\ud800", max_size=60)
WORDS = st.lists(
    st.sampled_from(
        ["####", r"\boxed{", "The answer is ", "Wait, ", "Question:", "**", "<<", r"\frac{1}", "1"]
    )
    | st.text(max_size=5),
    max_size=12,
).map("".join)


@settings(max_examples=200)
@given(text=HARSH | WORDS)
def test_no_text_is_too_strange(text):
    found = final_answer(text)
    assert found is None or (isinstance(found.value, Fraction) and found.rule)
