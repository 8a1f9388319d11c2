"""GSM8K against lm-evaluation-harness: its own filters and metric on the same outputs.

They skip where it is not installed (the extra `peers` brings it), but for the last, which holds
what the harness made.
"""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.evaluate import gsm8k
from gem_ds.evaluate.exact_match import compare
from tests.evaluate.test_final_answer import TABLE

#: The filters of the harness's task file gsm8k.yaml, version 3.0, before `take_first`.
FILTERS = {
    "strict-match": {"regex_pattern": r"#### (\-?[0-9\.\,]+)"},
    "flexible-extract": {"group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"},
}
IGNORED = [",", r"\$", "(?s).*#### ", r"\.$"]

#: SHA-256 of the 1,319 prompts with five worked problems that lm-eval 0.4.13 builds from these
#: files with its default seed, as JSON strings, one a line.
FIVE_SHOT_SHA256 = "319ccd39afc88e3456c852afcc1cd975c90f69819fe9260a08823f64c39bf47a"


@pytest.fixture(scope="module")
def harness():
    """(outputs, answers) -> by filter, the verdicts of the harness's own code."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="lm-eval lacks sacrebleu")
    from lm_eval.api.instance import Instance
    from lm_eval.filters import build_filter_ensemble

    def judge(outputs, answers):
        verdicts = {}
        for name, pattern in FILTERS.items():
            instances = [
                Instance("generate_until", {}, ("", {}), i, metadata=("gsm8k", i, 1), resps=[text])
                for i, text in enumerate(outputs)
            ]
            build_filter_ensemble(name, [("regex", pattern), ("take_first", None)]).apply(instances)
            verdicts[name] = [
                bool(
                    metrics.exact_match_fn(
                        predictions=[instance.filtered_resps[name]],
                        references=[answer],
                        regexes_to_ignore=IGNORED,
                        ignore_case=True,
                        ignore_punctuation=False,
                    )["exact_match"]
                )
                for instance, answer in zip(instances, answers, strict=True)
            ]
        return verdicts

    return judge


def check(harness, outputs, answers) -> None:
    theirs = harness(outputs, answers)
    ours = [compare(output, answer) for output, answer in zip(outputs, answers, strict=True)]
    assert [match.strict_match for match in ours] == theirs["strict-match"]
    assert [match.flexible_extract for match in ours] == theirs["flexible-extract"]


def test_the_table_of_tricky_outputs_is_judged_as_the_harness_does(harness):
    parts = ("written", "placed", "unforeseen")
    outputs = [text for part in parts for text, _ in TABLE[part]]
    for reference in ("18", "8", "-5", "1,000", "3.50", "$7", "[invalid]"):
        check(harness, outputs, [f"1+1=<<1+1=2>>2\n#### {reference}"] * len(outputs))


def test_any_text_is_judged_as_the_harness_does(harness):
    @settings(max_examples=400, deadline=None)
    @given(output=st.text("#$0125-., \n%/é{", max_size=30), answer=st.text("015.,-$ #", max_size=6))
    def agree(output, answer):
        check(harness, [output.replace("{", "#### ")], [f"so\n#### {answer}"])

    agree()


def test_five_shot_prompts_are_the_harness_s_to_the_byte(gem_data_dir):
    prompts = gsm8k.prompts_of(gsm8k.load(str(gem_data_dir / "gsm8k")), 5)
    assert len(prompts) == 1319
    content = "".join(json.dumps(prompt) + "\n" for prompt in prompts.values())
    assert hashlib.sha256(content.encode()).hexdigest() == FIVE_SHOT_SHA256
