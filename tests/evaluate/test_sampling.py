"""Whole sampling runs in one process: interrupted, continued, batched otherwise, refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from gem_ds.evaluate import model, sampling
from gem_ds.evaluate.decoding import Transformers
from tests.evaluate.test_generation import scripted
from tests.tiny_evaluation import DRAWN, draw, refusal
from tests.tiny_tasks import make_bert

PROMPTS = {f"task/{i}": f"Say {'so ' * (i % 4)}{i}" for i in range(7)}
KEYS = [(task, number) for task in PROMPTS for number in range(3)]


def sampled(tiny, output_dir, prompts=PROMPTS, num_samples=3, **options):
    return draw(tiny.model, output_dir, prompts, num_samples, **options)


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory) -> bytes:
    """The file of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    sampled(tiny, folder)
    return (folder / "samples.jsonl").read_bytes()


@pytest.fixture
def left(reference, tmp_path) -> Path:
    """That file, in a folder of one's own."""
    (tmp_path / "samples.jsonl").write_bytes(reference)
    return tmp_path / "samples.jsonl"


def texts(content: bytes) -> list[tuple[str, int, str]]:
    lines = map(json.loads, content.splitlines())
    return [(entry["task_id"], entry["sample"], entry["completion"]) for entry in lines]


@pytest.mark.parametrize(
    ("end", "script", "expected"),
    [
        ("<s>\n", "12<s>3", ("12", "stop", 3)),  # a token that no text shows
        ("<end>\n\n", "12<end>3", ("12", "stop", 7)),  # several tokens
        (" </s>", "12</s>3", ("12", "eos", 3)),
        ("\n", "12\n34567890", ("12\n345678", "length", 9)),  # white space ends nothing
    ],
)
def test_an_answer_of_a_chat_ends_where_its_template_ends_a_turn(
    tiny, tmp_path, monkeypatch, end, script, expected
):
    """A base model's eos is another token than the one that chats were learnt to end with."""
    turns = "{% for m in messages %}{{ m.role + ':' + m.content + end }}{% endfor %}"
    asks = "{% if add_generation_prompt %}assistant:{% endif %}"
    folder = tiny.speaking(f"chat{len(end)}", f"{{% set end = {end!r} %}}{turns}{asks}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answer = scripted(tokenizer, {":": tokenizer(script, add_special_tokens=False)["input_ids"]})
    monkeypatch.setattr(sampling, "load_model", lambda *_: answer)
    asked = {"a": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}
    settings = replace(DRAWN, temperature=0.0)
    (sample,) = draw(folder, tmp_path / "out", asked, 1, settings=settings)
    assert (sample.completion, sample.finish_reason, sample.num_tokens) == expected
    stops = [end.strip()] if end.strip() else []
    assert sample.settings["stop_strings"] == ["zz", *stops]


def test_a_file_holds_each_sample_and_all_that_decides_it(tiny, reference):
    lines = [json.loads(line) for line in reference.splitlines()]
    assert [(e["task_id"], e["sample"]) for e in lines] == KEYS
    assert {e["task_id"]: e["prompt"] for e in lines} == PROMPTS
    assert len({e["completion"] for e in lines}) > 15, "samples of a prompt must differ"
    assert all(0 < e["num_tokens"] <= 9 for e in lines)
    settings = lines[0]["settings"]
    assert all(e["settings"] == settings for e in lines)
    expected = {"model": str(tiny.model), "dtype": "float32", "delta_sha256": None}
    expected |= {"temperature": 1.2, "top_p": 0.9, "seed": 1, "stop_strings": ["zz"]}
    assert {name: settings[name] for name in expected} == expected


def test_a_sample_does_not_depend_on_what_else_is_sampled(tiny, reference, tmp_path):
    """More samples, fewer problems, another order, another batch size: each stays what it is."""
    some = {task_id: PROMPTS[task_id] for task_id in reversed([*PROMPTS][2:5])}
    found = sampled(tiny, tmp_path, prompts=some, num_samples=5, batch_size=1)
    expected = {(task, n): text for task, n, text in texts(reference)}
    common = [sample for sample in found if sample.sample < 3]
    assert len(common) == 9
    assert all(expected[sample.key] == sample.completion for sample in common)


def test_the_seed_changes_samples_and_greedy_ones_are_one(tiny, reference, left):
    """And overwriting begins anew."""
    seed = replace(DRAWN, seed=2)
    other = sampled(tiny, left.parent, settings=seed, overwrite_output_dir=True)
    different = [s.completion != t for s, (*_, t) in zip(other, texts(reference), strict=True)]
    assert sum(different) > 15
    greedy = replace(DRAWN, temperature=0.0)
    found = sampled(tiny, left.parent, settings=greedy, overwrite_output_dir=True)
    assert len({(sample.task_id, sample.completion) for sample in found}) == len(PROMPTS)
    assert [text for *_, text in texts(left.read_bytes())] == [s.completion for s in found]


def test_an_interrupted_run_goes_on_to_the_same_file(tiny, reference, tmp_path, monkeypatch):
    """Interrupted twice, once within a line; batches that are done are not made again."""
    complete, made = Transformers.complete, []

    def interrupted(self, requests):
        if len(made) in (2, 5):
            made.append(None)
            raise KeyboardInterrupt
        made.append([request.key for request in requests])
        return complete(self, requests)

    monkeypatch.setattr(Transformers, "complete", interrupted)
    path = tmp_path / "samples.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sampled(tiny, tmp_path)
    assert path.read_bytes().count(b"\n") == 8
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(KeyboardInterrupt):
        sampled(tiny, tmp_path)
    sampled(tiny, tmp_path)
    assert path.read_bytes() == reference
    batches = [batch for batch in made if batch is not None]
    assert len(batches) == 6 + 1, "the batch that had lost a line is made again, no other"
    assert sorted(key for batch in {*map(tuple, batches)} for key in batch) == sorted(KEYS)


def test_results_last_as_long_as_the_samples_that_they_were_counted_on(tiny, left, monkeypatch):
    """A complete file needs no weights, and one that is not loses its results."""
    reference = left.read_bytes()
    results = [left.with_name(name) for name in ("results.json", "verdicts.jsonl")]
    for path in results:
        path.write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(model, "load_weights", None)
        assert len(sampled(tiny, left.parent)) == 21
    assert left.read_bytes() == reference
    assert all(path.exists() for path in results)
    left.write_bytes(reference[:-1])
    sampled(tiny, left.parent)
    assert left.read_bytes() == reference
    assert not any(path.exists() for path in results)


def test_what_another_model_left_is_refused_in_one_sentence(tiny, reference, left):
    """All else that tells runs apart is told in test_samples.py."""
    told = refusal(sampled, tiny, left.parent, dtype="bfloat16")
    assert 'holds another run, with dtype "float32" and not "bfloat16"' in told
    weights = tiny.model / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        assert "holds another run, with model_fingerprint" in refusal(sampled, tiny, left.parent)
    finally:
        weights.write_bytes(before)
    assert left.read_bytes() == reference


def test_what_the_model_cannot_do_is_refused_before_its_weights_are_read(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(model, "load_weights", None)
    bare, bert = tmp_path / "bare", make_bert(tmp_path / "bert")
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny.model / "config.json").read_bytes())
    cases = [
        ({"model_name_or_path": str(bare)}, "holds no tokenizer"),
        ({"model_name_or_path": "./nowhere"}, "nowhere cannot be loaded"),
        ({"model_name_or_path": str(bert)}, "is an encoder (bert), which does not write"),
        ({"delta": str(tmp_path / "nowhere")}, "no delta file at"),
        ({"prompts": PROMPTS | {"task/9": "a" * 200}}, "prompt of task/9 has 200 tokens"),
    ]
    for changes, message in cases:
        assert message in refusal(sampled, tiny, tmp_path / "out", **changes)
        assert not (tmp_path / "out").exists()


def test_a_batch_beyond_the_memory_says_what_to_lower(tiny, tmp_path, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(Transformers, "_generate", out_of_memory)
    with pytest.raises(ValueError, match=r"does not hold a batch of 4 samples.*lower --batch_size"):
        sampled(tiny, tmp_path)
