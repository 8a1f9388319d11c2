"""Whole sampling runs in one process: interrupted, continued, batched otherwise, refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gem_ds.evaluate import sampling
from gem_ds.evaluate.arguments import SamplingArguments, check_arguments
from gem_ds.evaluate.decoding import Transformers
from gem_ds.evaluate.generation import GenerationSettings
from gem_ds.evaluate.sampling import sample_all
from tests.tiny import DS_CONFIGS
from tests.tiny_model import make_tiny
from tests.tiny_tasks import make_bert

PROMPTS = {f"task/{i}": f"Say {'so ' * (i % 4)}{i}" for i in range(7)}
ZERO3 = str(DS_CONFIGS / "zero3.json")
DRAWN = GenerationSettings(
    max_new_tokens=9, stop_strings=("zz",), temperature=1.2, top_p=0.9, seed=1
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def one_thread():
    """What a product rounds to depends on the number of threads that it is shared over."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(tiny, output_dir: Path, /, **changes) -> SamplingArguments:
    options = {
        "model_name_or_path": str(tiny.model),
        "output_dir": str(output_dir),
        "batch_size": 4,
        "dtype": "float32",
        "disable_tqdm": True,
    }
    return SamplingArguments(**options | changes)


def sampled(tiny, output_dir, settings=DRAWN, prompts=PROMPTS, num_samples=3, **changes):
    found = sample_all(
        arguments(tiny, output_dir, **changes), prompts, settings, num_samples=num_samples
    )
    assert found is not None
    return found


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory) -> bytes:
    """The file of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sampled(tiny, folder)
    torch.set_num_threads(threads)
    return (folder / "samples.jsonl").read_bytes()


def texts(content: bytes) -> list[tuple[str, int, str]]:
    lines = map(json.loads, content.splitlines())
    return [(entry["task_id"], entry["sample"], entry["completion"]) for entry in lines]


def test_a_file_holds_each_sample_and_all_that_decides_it(tiny, reference):
    lines = [json.loads(line) for line in reference.splitlines()]
    assert [(e["task_id"], e["sample"]) for e in lines] == [
        (t, n) for t in PROMPTS for n in range(3)
    ]
    assert {e["task_id"]: e["prompt"] for e in lines} == PROMPTS
    assert len({e["completion"] for e in lines}) > 15, "samples of a prompt must differ"
    assert all(0 < e["num_tokens"] <= 9 for e in lines)
    settings = lines[0]["settings"]
    assert all(e["settings"] == settings for e in lines)
    assert settings["model"] == str(tiny.model)
    assert settings["dtype"] == "float32"
    assert settings["delta_sha256"] is None
    assert [settings[name] for name in ("temperature", "top_p", "seed")] == [1.2, 0.9, 1]
    assert settings["stop_strings"] == ["zz"]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_size_changes_no_sample(tiny, reference, tmp_path, batch_size):
    sampled(tiny, tmp_path, batch_size=batch_size)
    assert (tmp_path / "samples.jsonl").read_bytes() == reference


def test_a_sample_does_not_depend_on_what_else_is_sampled(tiny, reference, tmp_path):
    """More samples, fewer problems, another order: each stays what it is."""
    some = {task_id: PROMPTS[task_id] for task_id in reversed([*PROMPTS][2:5])}
    found = sampled(tiny, tmp_path, prompts=some, num_samples=5)
    expected = {(task, n): text for task, n, text in texts(reference)}
    common = [sample for sample in found if sample.sample < 3]
    assert len(common) == 9
    assert all(expected[sample.key] == sample.completion for sample in common)


def test_the_seed_changes_samples_and_greedy_ones_are_one(tiny, reference, tmp_path):
    other = sampled(tiny, tmp_path / "seed", replace(DRAWN, seed=2))
    different = [s.completion != t for s, (*_, t) in zip(other, texts(reference), strict=True)]
    assert sum(different) > 15
    greedy = sampled(tiny, tmp_path / "greedy", replace(DRAWN, temperature=0.0))
    assert len({(sample.task_id, sample.completion) for sample in greedy}) == len(PROMPTS)


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
    assert sorted(key for batch in {*map(tuple, batches)} for key in batch) == sorted(
        (task, n) for task in PROMPTS for n in range(3)
    )


def test_a_complete_file_needs_no_weights(tiny, reference, tmp_path, monkeypatch):
    (tmp_path / "samples.jsonl").write_bytes(reference)
    (tmp_path / "results.json").write_text("{}")
    monkeypatch.setattr(sampling, "load_weights", None)
    assert len(sampled(tiny, tmp_path)) == 21
    assert (tmp_path / "samples.jsonl").read_bytes() == reference
    assert (tmp_path / "results.json").exists()


def test_results_do_not_outlive_the_samples_that_they_were_counted_on(tiny, reference, tmp_path):
    (tmp_path / "samples.jsonl").write_bytes(reference[:-1])
    (tmp_path / "results.json").write_text("{}")
    sampled(tiny, tmp_path)
    assert not (tmp_path / "results.json").exists()


def other_model(tiny) -> str:
    """The same architecture under another name, with one weight changed."""
    path = tiny.folder / "other"
    if not path.exists():
        tiny.variant("other")
        weights = path / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    return str(path)


def test_what_another_run_left_is_refused_in_one_sentence(tiny, reference, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(reference)

    def refusal(settings=DRAWN, **changes):
        with pytest.raises(ValueError, match="holds another run") as caught:
            sampled(tiny, tmp_path, settings, **changes)
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == reference
        return str(caught.value)

    assert "seed 1 and not 2" in refusal(replace(DRAWN, seed=2))
    assert "temperature 1.2 and not 0.7" in refusal(replace(DRAWN, temperature=0.7))
    assert "max_new_tokens 9 and not 8" in refusal(replace(DRAWN, max_new_tokens=8))
    assert "dtype" in refusal(dtype="bfloat16")
    assert "model" in refusal(model_name_or_path=other_model(tiny))
    assert "sample 2 of 'task/0'" in refusal(num_samples=2)
    assert "another prompt for 'task/3'" in refusal(prompts=PROMPTS | {"task/3": "Else"})


def test_a_model_that_was_trained_on_under_its_name_is_another(tiny, reference, tmp_path):
    path = tiny.folder / "model"
    weights = path / "model.safetensors"
    before = weights.read_bytes()
    (tmp_path / "samples.jsonl").write_bytes(reference)
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        with pytest.raises(ValueError, match="with model_fingerprint"):
            sampled(tiny, tmp_path)
    finally:
        weights.write_bytes(before)


def test_overwriting_begins_anew(tiny, reference, tmp_path):
    (tmp_path / "samples.jsonl").write_bytes(reference)
    sampled(tiny, tmp_path, replace(DRAWN, seed=2), overwrite_output_dir=True)
    assert texts((tmp_path / "samples.jsonl").read_bytes()) != texts(reference)
    sampled(tiny, tmp_path, overwrite_output_dir=True)
    assert (tmp_path / "samples.jsonl").read_bytes() == reference


def test_what_the_model_cannot_do_is_refused_before_its_weights_are_read(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(sampling, "load_weights", None)

    def refusal(prompts=PROMPTS, **changes):
        with pytest.raises((ValueError, OSError)) as caught:
            sampled(tiny, tmp_path / "out", prompts=prompts, **changes)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    bare = tiny.folder / "bare"
    bare.mkdir(exist_ok=True)
    (bare / "config.json").write_bytes((tiny.model / "config.json").read_bytes())
    assert "holds no tokenizer" in refusal(model_name_or_path=str(bare))
    assert "nowhere cannot be loaded" in refusal(model_name_or_path="./nowhere")
    bert = str(make_bert(tmp_path / "bert"))
    assert "is an encoder (bert), which does not write" in refusal(model_name_or_path=bert)
    assert "no delta file at" in refusal(delta=str(tmp_path / "nowhere"))
    too_long = PROMPTS | {"task/9": "a" * 200}
    assert "prompt of task/9 has 200 tokens" in refusal(prompts=too_long)
    narrow = tiny.folder / "narrow"
    if not narrow.exists():
        tiny.variant("narrow", vocab_size=60)
    assert "knows 60 tokens" in refusal(model_name_or_path=str(narrow))


def test_a_batch_beyond_the_memory_says_what_to_lower(tiny, tmp_path, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(Transformers, "_generate", out_of_memory)
    with pytest.raises(ValueError, match=r"does not hold a batch of 4 samples.*lower --batch_size"):
        sampled(tiny, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0}, "--limit must be at least 1, not 0"),
        ({"batch_size": 0}, "--batch_size must be at least 1, not 0"),
        ({"output_dir": __file__}, "is a file"),
        ({"backend": "vllm", "delta": "d"}, "--backend vllm takes no --delta"),
        ({"deepspeed": "nowhere.json"}, "--deepspeed nowhere.json cannot be read"),
        ({"backend": "vllm", "deepspeed": ZERO3}, "start it with plain python"),
    ],
)
def test_flags_that_cannot_be_are_refused(tiny, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(arguments(tiny, tmp_path, **changes))
