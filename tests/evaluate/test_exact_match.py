"""The three rules of exact match, in a table and two of them against lm-evaluation-harness."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.evaluate.gsm8k import Match, compare, summary, tally
from gem_ds.evaluate.pass_at_k import bootstrap_interval
from tests.evaluate.test_final_answer import TABLE as TRICKY

TABLE = tomllib.loads(Path(__file__).with_name("exact_match.toml").read_text("utf-8"))["table"]


@pytest.mark.parametrize(("output", "reference", "rules"), TABLE)
def test_verdicts_on_a_table(output, reference, rules):
    strict, flexible, numeric = (rule in rules for rule in "sfn")
    expected = Match(strict_match=strict, flexible_extract=flexible, numeric=numeric)
    assert compare(output, reference) == expected
    assert compare(output, f" 1+1=<<1+1=2>>2, then\n#### {reference}") == expected


#: The filters of the harness's task file gsm8k.yaml, version 3.0, before `take_first`.
FILTERS = {
    "strict_match": {"regex_pattern": r"#### (\-?[0-9\.\,]+)"},
    "flexible_extract": {"group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"},
}
IGNORED = [",", r"\$", "(?s).*#### ", r"\.$"]


def described(output: str, answer: str, regex_pattern: str, group_select: int = 0) -> bool:
    """A rule as the harness's task file and filter describe it, step by step."""
    match = (re.findall(regex_pattern, output) or ["[invalid]"])[group_select]
    if isinstance(match, tuple):
        match = next(group for group in match if group)
    sides = [match.strip(), answer]
    for ignored in IGNORED:
        sides = [re.sub(ignored, "", side) for side in sides]
    return sides[0] == sides[1]


@pytest.fixture(scope="module", params=["described", "lm_eval"])
def harness(request):
    """(output, answer, filter) -> the verdict, as described or by the harness's own code."""
    if request.param == "described":
        return described
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="lm-eval lacks sacrebleu")
    from lm_eval.api.instance import Instance
    from lm_eval.filters import build_filter_ensemble

    def judge(output: str, answer: str, **pattern) -> bool:
        told = {"metadata": ("gsm8k", 0, 1), "resps": [output]}
        instance = Instance("generate_until", {}, ("", {}), 0, **told)
        build_filter_ensemble("rule", [("regex", pattern), ("take_first", None)]).apply([instance])
        sides = {"predictions": [instance.filtered_resps["rule"]], "references": [answer]}
        how = {"regexes_to_ignore": IGNORED, "ignore_case": True, "ignore_punctuation": False}
        return bool(metrics.exact_match_fn(**sides, **how)["exact_match"])

    return judge


def check(harness, output: str, answer: str) -> None:
    match = compare(output, answer)
    for rule, pattern in FILTERS.items():
        assert getattr(match, rule) == harness(output, answer, **pattern), (rule, output, answer)


def test_tricky_outputs_are_judged_as_the_harness_does(harness):
    for reference in ("18", "8", "-5", "1,000", "3.50", "$7", "[invalid]"):
        for part in ("written", "placed", "unforeseen"):
            for output, _ in TRICKY[part]:
                check(harness, output, f"1+1=<<1+1=2>>2\n#### {reference}")


def test_any_text_is_judged_as_the_harness_does(harness):
    @settings(max_examples=400)
    @given(
        output=st.text("#$0125-., \n%/é{", max_size=30) | st.text(max_size=60),
        answer=st.text("015.,-$ #", max_size=6),
    )
    def agree(output, answer):
        check(harness, output.replace("{", "#### "), f"so\n#### {answer}")

    agree()


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
    interval = exact_match["numeric"]["confidence_interval"]
    assert interval == [*bootstrap_interval([1.0, 1.0, 1.0, 0.0])]
    assert summary(exact_match) == (
        "exact match: strict-match 1/4 = 25.0 %, flexible-extract 1/4 = 25.0 %, "
        "numeric 3/4 = 75.0 %"
    )
