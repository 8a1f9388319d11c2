"""The three rules of exact match, in a table and two of them as the harness describes them."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.evaluate.exact_match import Match, compare, summary, tally

TABLE = tomllib.loads(Path(__file__).with_name("exact_match.toml").read_text("utf-8"))["table"]


@pytest.mark.parametrize(("output", "reference", "rules"), TABLE)
def test_verdicts_on_a_table(output, reference, rules):
    strict, flexible, numeric = (rule in rules for rule in "sfn")
    expected = Match(strict_match=strict, flexible_extract=flexible, numeric=numeric)
    assert compare(output, reference) == expected
    assert compare(output, f" 1+1=<<1+1=2>>2, then\n#### {reference}") == expected


def harness(output: str, answer: str, pattern: str, position: int) -> bool:
    """A rule as the harness's task file and filter describe it, step by step."""
    found = re.findall(pattern, output)
    if not found:
        return False
    match = found[position]
    if isinstance(match, tuple):
        match = next(group for group in match if group)
    sides = []
    for side in (match.strip(), answer):
        for ignored in (",", "\\$", "(?s).*#### ", "\\.$"):
            side = re.sub(ignored, "", side)
        sides.append(side)
    return sides[0] == sides[1]


@settings(max_examples=200)
@given(
    output=st.text("#$0125-., \n%/é{", max_size=30) | st.text(max_size=60),
    answer=st.text("015.,-$", max_size=4),
)
def test_the_two_harness_rules_agree_with_its_description(output, answer):
    output = output.replace("{", "#### ")
    verdict = compare(output, f"so\n#### {answer}")
    strict = harness(output, f"so\n#### {answer}", r"#### (\-?[0-9\.\,]+)", 0)
    flexible = harness(output, f"so\n#### {answer}", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)
    assert (verdict.strict_match, verdict.flexible_extract) == (strict, flexible)


def test_references_of_the_dataset_are_right_under_every_rule(gem_data_dir):
    """Every eighth of them; the others differ in their numbers only."""
    matches = []
    for split in ("train", "test"):
        with open(gem_data_dir / "gsm8k" / f"{split}.jsonl", encoding="utf-8") as file:
            answers = [json.loads(line)["answer"] for line in list(file)[::8]]
        matches += [compare(answer, answer) for answer in answers]
    assert len(matches) == 935 + 165
    assert all(counts["correct"] == 1100 for counts in tally(matches, 1100).values())
    assert {match.rule for match in matches} == {"hash-marks"}


def test_the_tally_counts_each_rule():
    right = Match(strict_match=True, flexible_extract=True, numeric=True)
    half = Match(strict_match=False, flexible_extract=False, numeric=True)
    exact_match = tally([right, half, half], 4)  # one problem has no sample
    counted = [(counts["correct"], counts["accuracy"]) for counts in exact_match.values()]
    assert [*exact_match] == ["strict-match", "flexible-extract", "numeric"]
    assert counted == [(1, 0.25), (1, 0.25), (3, 0.75)]
    assert all(counts["total"] == 4 for counts in exact_match.values())
    assert summary(exact_match) == (
        "exact match: strict-match 1/4 = 25.0 %, flexible-extract 1/4 = 25.0 %, "
        "numeric 3/4 = 75.0 %"
    )


def test_the_interval_is_that_of_a_share():
    """Against the normal approximation of a binomial share, which is good for 900 problems."""
    verdicts = [
        Match(strict_match=i % 3 == 0, flexible_extract=False, numeric=True) for i in range(900)
    ]
    exact_match = tally(verdicts, 900)
    low, high = exact_match["strict-match"]["confidence_interval"]
    half = 1.96 * (1 / 3 * 2 / 3 / 900) ** 0.5
    assert low == pytest.approx(1 / 3 - half, abs=0.003)
    assert high == pytest.approx(1 / 3 + half, abs=0.003)
    assert exact_match["numeric"]["confidence_interval"] == [1.0, 1.0]
