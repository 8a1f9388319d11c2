"""The whole command of GSM8K, on a model that knows two answers and a delta that changes which."""

import hashlib
import json
import random
import runpy
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gem_ds.evaluate import gsm8k
from gem_ds.evaluate.samples import read_samples
from gem_ds.files.delta import Delta
from gem_ds.files.mask import Mask, WeightInfo, checksum
from tests.tiny_tokenizers import byte_level

ANSWERS = ("#### 7", "#### 8", "#### 8", "#### 8", "#### 7.00")


def bigram_model(tokenizer) -> LlamaForCausalLM:
    """Writes ` #### 7` after a colon, then stops; ` #### 8` has a place but is not reached."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    colon, seven, eight = tokenizer.convert_tokens_to_ids([":", " #### 7", " #### 8"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        embedding, output = model.model.embed_tokens.weight, model.lm_head.weight
        embedding[colon, 0] = embedding[seven, 1] = embedding[eight, 1] = 1.0
        output[seven, 0] = output[tokenizer.eos_token_id, 1] = output[eight, 2] = 1.0
    return model


def save_delta(path, model, tokenizer) -> None:
    """A delta after which a colon leads to ` #### 8`."""
    name = "model.embed_tokens.weight"
    weight = model.get_parameter(name).detach()
    colon = tokenizer.convert_tokens_to_ids(":")
    indices = torch.tensor([4 * colon, 4 * colon + 2], dtype=torch.int32)
    info = WeightInfo(
        shape=tuple(weight.shape),
        dtype="float32",
        checksum=checksum(weight.view(-1)[indices.long()]),
    )
    mask = Mask(indices={name: indices}, weights={name: info}, base_model="base", settings={})
    Delta(mask=mask, values={name: torch.tensor([0.0, 1.0])}).save(path)


@pytest.fixture
def folder(tmp_path):
    """A folder with a base model, a delta and five problems."""
    tokenizer = byte_level(" #### 7", " #### 8")
    model = bigram_model(tokenizer)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    save_delta(tmp_path / "delta.safetensors", model, tokenizer)
    (tmp_path / "data").mkdir()
    lines = [
        json.dumps({"question": f"How many{' many' * (i % 3)}?", "answer": f"hm\n{answer}"}) + "\n"
        for i, answer in enumerate(ANSWERS)
    ]
    (tmp_path / "data" / "test.jsonl").write_text("".join(lines))
    (tmp_path / "data" / "train.jsonl").write_text(lines[0])
    return tmp_path


def arguments(folder, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(folder / "base")),
        *("--data_dir", str(folder / "data")),
        *("--output_dir", str(folder / "out")),
        *("--batch_size", "2"),
        *more,
    ]


def counts(results) -> list[int]:
    return [rule["correct"] for rule in results["exact_match"].values()]


def samples_of(folder) -> list[dict]:
    return [
        json.loads(line) for line in (folder / "out" / "samples.jsonl").read_text().splitlines()
    ]


def test_the_base_model_is_sampled_and_scored(folder, capsys):
    results = gsm8k.main(arguments(folder))
    assert counts(results) == [1, 1, 2]  # 7.00 is 7 by value, not as a string
    out, err = capsys.readouterr()
    assert out == (
        "exact match: strict-match 1/5 = 20.0 %, flexible-extract 1/5 = 20.0 %, "
        "numeric 2/5 = 40.0 %\n"
    )
    assert err == "", "no bar is drawn into a log file"
    assert json.loads((folder / "out" / "results.json").read_text()) == json.loads(
        json.dumps(results)
    )
    samples = samples_of(folder)
    assert [sample["task_id"] for sample in samples] == [f"gsm8k/test/{i}" for i in range(5)]
    for i, sample in enumerate(samples):
        assert sample["prompt"] == f"Question: How many{' many' * (i % 3)}?\nAnswer:"
        assert sample["completion"] == " #### 7"
        assert (sample["num_tokens"], sample["finish_reason"]) == (2, "eos")
        assert sample["settings"] == {
            "model": str(folder / "base"),
            "model_fingerprint": results["sampling"]["model_fingerprint"],
            "delta_sha256": None,
            "adapter_sha256": None,
            "dtype": "float32",
            "backend": "transformers",
            "max_new_tokens": 256,
            "stop_strings": ["Question:", "</s>", "<|im_end|>"],
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": 0,
        }
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "results.json",
        "samples.jsonl",
        "verdicts.jsonl",
    ]


def test_on_a_terminal_bars_are_drawn_unless_they_are_unwanted(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    gsm8k.main(arguments(folder, "--disable_tqdm"))
    assert capsys.readouterr().err == ""
    gsm8k.main(arguments(folder, "--overwrite_output_dir"))
    err = capsys.readouterr().err
    assert "Loading weights: " in err
    assert "Sampling: 100%" in err


def test_results_say_what_they_rest_on(folder):
    results = gsm8k.main(arguments(folder))
    assert results["n"] == 5
    assert results["protocol"] == {"split": "test", "num_fewshot": 0, "shot_seed": 1234}
    assert results["sampling"] == samples_of(folder)[0]["settings"]
    assert results["numeric_found_by"] == {"hash-marks": 5}
    assert results["without_samples"] == []
    for name, digest in results["data_sha256"].items():
        assert digest == hashlib.sha256((folder / "data" / name).read_bytes()).hexdigest()
    assert [*results["data_sha256"]] == ["train.jsonl", "test.jsonl"]
    assert results["versions"]["torch"] == torch.__version__
    verdicts = [
        json.loads(line) for line in (folder / "out" / "verdicts.jsonl").read_text().splitlines()
    ]
    assert [verdict["numeric"] for verdict in verdicts] == [True, False, False, False, True]
    assert {verdict["rule"] for verdict in verdicts} == {"hash-marks"}


def test_worked_problems_stand_before_the_prompt_and_change_it(folder):
    (folder / "data" / "train.jsonl").write_text(
        "".join(json.dumps({"question": f"q{i}?", "answer": f"#### {i}"}) + "\n" for i in range(9))
    )
    results = gsm8k.main(arguments(folder, "--num_fewshot", "2"))
    assert results["protocol"]["num_fewshot"] == 2
    drawn = random.Random(1234)
    for i, sample in enumerate(samples_of(folder)):
        one, two = drawn.sample(range(9), 2)
        assert sample["prompt"] == (
            f"Question: q{one}?\nAnswer: #### {one}\n\nQuestion: q{two}?\nAnswer: #### {two}\n\n"
            f"Question: How many{' many' * (i % 3)}?\nAnswer:"
        )


def test_a_delta_changes_what_is_scored(folder):
    results = gsm8k.main(arguments(folder, "--delta", str(folder / "delta.safetensors")))
    assert counts(results) == [3, 3, 3]


def test_limit_takes_the_first_problems_and_max_new_tokens_ends_answers(folder):
    more = ("--limit", "2", "--max_new_tokens", "1")
    results = gsm8k.main(arguments(folder, *more))
    assert [rule["total"] for rule in results["exact_match"].values()] == [2, 2, 2]
    samples = samples_of(folder)
    assert [sample["finish_reason"] for sample in samples] == ["length", "length"]


def test_a_finished_evaluation_run_again_is_only_scored_again(folder, monkeypatch):
    before = gsm8k.main(arguments(folder))
    samples = (folder / "out" / "samples.jsonl").read_bytes()
    monkeypatch.setattr("gem_ds.evaluate.sampling.load_weights", None)
    after = gsm8k.main(arguments(folder))
    assert after | {"seconds": 0} == before | {"seconds": 0}
    assert (folder / "out" / "samples.jsonl").read_bytes() == samples


def test_results_are_replaced_only_when_asked_to_and_when_the_new_ones_exist(folder):
    delta = ("--delta", str(folder / "delta.safetensors"))
    gsm8k.main(arguments(folder))
    before = (folder / "out" / "results.json").read_bytes()
    with pytest.raises(ValueError, match="overwrite_output_dir"):
        gsm8k.main(arguments(folder, *delta))
    assert (folder / "out" / "results.json").read_bytes() == before
    with pytest.raises(FileNotFoundError, match="no delta file"):
        gsm8k.main(arguments(folder, "--overwrite_output_dir", "--delta", "nowhere"))
    assert (folder / "out" / "results.json").read_bytes() == before
    results = gsm8k.main(arguments(folder, "--overwrite_output_dir", *delta))
    assert json.loads((folder / "out" / "results.json").read_text()) == json.loads(
        json.dumps(results)
    )
    assert counts(results) == [3, 3, 3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--limit", "0"), "--limit must be at least 1, not 0"),
        (("--batch_size", "-1"), "--batch_size must be at least 1, not -1"),
        (("--num_fewshot", "-1"), "--num_fewshot must be at least 0 and at most 1, the size"),
        (("--num_fewshot", "2"), "--num_fewshot must be at least 0 and at most 1, the size"),
        (("--backend", "vllm"), "--backend vllm takes no --delta"),
        (("--deepspeed", "nowhere.json"), "--deepspeed nowhere.json cannot be read"),
        (("--max_new_tokens", "0"), "--max_new_tokens must be at least 1, not 0"),
        (("--data_dir", "nowhere"), "There is no file nowhere"),
        (("--model_name_or_path", "./nowhere"), "nowhere cannot be loaded"),
        (("--delta", "./nowhere"), "no delta file at"),
        (("--dtype", "bfloat16"), "leave --dtype out"),
        (("--output_dir", __file__), "is a file"),
    ],
)
def test_bad_input_ends_in_one_sentence(folder, more, message):
    delta = () if "--delta" in more else ("--delta", str(folder / "delta.safetensors"))
    with pytest.raises((ValueError, OSError)) as caught:
        gsm8k.main(arguments(folder, *delta, *more))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "out" / "results.json").exists()


def test_a_problem_without_a_reference_is_refused(folder):
    (folder / "data" / "test.jsonl").write_text('{"question": "Why?", "answer": "So."}\n')
    with pytest.raises(ValueError, match="Example 1 of the test split has no '#### <number>'"):
        gsm8k.main(arguments(folder))


def test_samples_that_cannot_be_scored_against_these_data_are_refused(folder):
    gsm8k.main(arguments(folder))
    problems = gsm8k.load(str(folder / "data"))
    samples = read_samples(folder / "out" / "samples.jsonl", list(problems.test))
    with pytest.raises(ValueError, match="one sample of each problem, and gsm8k/test/1 has 2"):
        gsm8k.report(problems, [*samples, samples[1]])
    data = folder / "data" / "test.jsonl"
    data.write_text(data.read_text().replace("How many?", "How much?"))
    with pytest.raises(ValueError, match="prompt of gsm8k/test/0 is not what these data"):
        gsm8k.report(gsm8k.load(str(folder / "data")), samples)


def test_the_module_runs_as_a_program_and_fails_with_a_sentence(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.gsm8k", *arguments(folder, "--limit", "1")])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("eval.gsm8k", run_name="__main__", alter_sys=True)
    assert caught.value.code == 0
    assert "strict-match 1/1 = 100.0 %" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["eval.gsm8k", *arguments(folder, "--limit", "0")])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("eval.gsm8k", run_name="__main__", alter_sys=True)
    assert caught.value.code == 1
    assert capsys.readouterr().err == "Error: --limit must be at least 1, not 0.\n"
