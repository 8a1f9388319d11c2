"""The whole command of GSM8K, on a model that knows two answers and a delta that changes which."""

import hashlib
import json
import random
import runpy
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from gem_ds.evaluate import gsm8k
from gem_ds.evaluate.samples import read_samples
from tests.runs import rows_of
from tests.tiny_evaluation import REFUSED, one_layer, refusal, save_delta
from tests.tiny_model import write_jsonl
from tests.tiny_tokenizers import byte_level

#: SHA-256 of the 1,319 prompts with five worked problems that lm-eval 0.4.13 builds from these
#: files with its default seed, as JSON strings, one a line.
FIVE_SHOT_SHA256 = "319ccd39afc88e3456c852afcc1cd975c90f69819fe9260a08823f64c39bf47a"
ANSWERS = ("#### 7", "#### 8", "#### 8", "#### 8", "#### 7.00")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that writes ` #### 7` after a colon; with the delta, ` #### 8`. Both then stop."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = byte_level(" #### 7", " #### 8")
    config = one_layer(len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model = LlamaForCausalLM(config)
    colon, seven, eight = tokenizer.convert_tokens_to_ids([":", " #### 7", " #### 8"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        embedding, output = model.model.embed_tokens.weight, model.lm_head.weight
        embedding[colon, 0] = embedding[seven, 1] = embedding[eight, 1] = 1.0
        output[seven, 0] = output[tokenizer.eos_token_id, 1] = output[eight, 2] = 1.0
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    moved = torch.tensor([4 * colon, 4 * colon + 2]), torch.tensor([-1.0, 1.0])
    save_delta(folder / "delta.safetensors", model, {"model.embed_tokens.weight": moved})
    return folder


@pytest.fixture
def folder(base, tmp_path):
    """A folder with the base model, the delta and five problems."""
    for name in ("base", "delta.safetensors"):
        (tmp_path / name).symlink_to(base / name)
    rows = [
        {"question": f"How many{' many' * (i % 3)}?", "answer": f"hm\n{answer}"}
        for i, answer in enumerate(ANSWERS)
    ]
    write_jsonl(tmp_path / "data" / "test.jsonl", rows)
    write_jsonl(tmp_path / "data" / "train.jsonl", rows[:1])
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
    return rows_of(folder / "out" / "samples.jsonl")


def test_the_base_model_is_sampled_and_scored(folder, capsys):
    results = gsm8k.main(arguments(folder))
    assert counts(results) == [1, 1, 2]  # 7.00 is 7 by value, not as a string
    out, err = capsys.readouterr()
    assert out == (
        "exact match: strict-match 1/5 = 20.0 %, flexible-extract 1/5 = 20.0 %, "
        "numeric 2/5 = 40.0 %\n"
    )
    assert err == "", "no bar is drawn into a log file"
    files = sorted(path.name for path in (folder / "out").iterdir())
    assert files == ["results.json", "samples.jsonl", "verdicts.jsonl"]
    assert json.loads((folder / "out" / "results.json").read_text()) == results
    settings = {
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
    assert samples_of(folder) == [
        {
            "task_id": f"gsm8k/test/{i}",
            "sample": 0,
            "prompt": f"Question: How many{' many' * (i % 3)}?\nAnswer:",
            "completion": " #### 7",
            "finish_reason": "eos",
            "num_tokens": 2,
            "settings": settings,
        }
        for i in range(5)
    ]
    assert results["sampling"] == settings
    assert results["n"] == 5
    assert results["protocol"] == {"split": "test", "num_fewshot": 0, "shot_seed": 1234}
    assert results["numeric_found_by"] == {"hash-marks": 5}
    assert results["without_samples"] == []
    for name, digest in results["data_sha256"].items():
        assert digest == hashlib.sha256((folder / "data" / name).read_bytes()).hexdigest()
    assert [*results["data_sha256"]] == ["train.jsonl", "test.jsonl"]
    assert {"python", "transformers", "device"} <= results["versions"].keys()
    assert results["versions"]["torch"] == torch.__version__
    verdicts = rows_of(folder / "out" / "verdicts.jsonl")
    assert [verdict["numeric"] for verdict in verdicts] == [True, False, False, False, True]
    assert {verdict["rule"] for verdict in verdicts} == {"hash-marks"}


def test_on_a_terminal_bars_are_drawn_unless_they_are_unwanted(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    gsm8k.main(arguments(folder, "--disable_tqdm"))
    assert capsys.readouterr().err == ""
    gsm8k.main(arguments(folder, "--overwrite_output_dir"))
    err = capsys.readouterr().err
    assert "Loading weights: " in err
    assert "Sampling: 100%" in err


def test_worked_problems_stand_before_the_prompt_and_change_it(folder):
    rows = [{"question": f"q{i}?", "answer": f"#### {i}"} for i in range(9)]
    write_jsonl(folder / "data" / "train.jsonl", rows)
    results = gsm8k.main(arguments(folder, "--num_fewshot", "2"))
    assert results["protocol"]["num_fewshot"] == 2
    drawn = random.Random(1234)
    for i, sample in enumerate(samples_of(folder)):
        one, two = drawn.sample(range(9), 2)
        assert sample["prompt"] == (
            f"Question: q{one}?\nAnswer: #### {one}\n\nQuestion: q{two}?\nAnswer: #### {two}\n\n"
            f"Question: How many{' many' * (i % 3)}?\nAnswer:"
        )


def test_five_shot_prompts_are_the_harness_s_to_the_byte(gem_data_dir):
    prompts = gsm8k.prompts_of(gsm8k.load(str(gem_data_dir / "gsm8k")), 5)
    assert len(prompts) == 1319
    content = "".join(json.dumps(prompt) + "\n" for prompt in prompts.values())
    assert hashlib.sha256(content.encode()).hexdigest() == FIVE_SHOT_SHA256


def test_a_finished_evaluation_is_scored_again_and_replaced_only_when_that_is_asked(
    folder, monkeypatch
):
    """By a delta, which changes what is scored, and only when the new results exist."""
    first = gsm8k.main(arguments(folder))
    samples = (folder / "out" / "samples.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("gem_ds.evaluate.model.load_weights", None)
        again = gsm8k.main(arguments(folder))
    assert again | {"seconds": 0} == first | {"seconds": 0}
    assert (folder / "out" / "samples.jsonl").read_bytes() == samples
    before = (folder / "out" / "results.json").read_bytes()
    delta = ("--delta", str(folder / "delta.safetensors"))
    assert "overwrite_output_dir" in refusal(gsm8k.main, arguments(folder, *delta))
    nowhere = ("--overwrite_output_dir", "--delta", "nowhere")
    assert "no delta file" in refusal(gsm8k.main, arguments(folder, *nowhere))
    assert (folder / "out" / "results.json").read_bytes() == before
    results = gsm8k.main(arguments(folder, "--overwrite_output_dir", *delta))
    assert json.loads((folder / "out" / "results.json").read_text()) == results
    assert counts(results) == [3, 3, 3]


@pytest.mark.parametrize(("more", "message"), REFUSED["gsm8k"])
def test_bad_input_ends_in_one_sentence(folder, more, message):
    delta = ("--delta", str(folder / "delta.safetensors"))
    assert message in refusal(gsm8k.main, arguments(folder, *delta, *more.split()))
    assert not (folder / "out" / "results.json").exists()


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
    write_jsonl(data, [{"question": "Why?", "answer": "So."}])
    with pytest.raises(ValueError, match="Example 1 of the test split has no '#### <number>'"):
        gsm8k.load(str(folder / "data"))


def test_the_module_runs_as_a_program_and_fails_with_a_sentence(folder, monkeypatch, capsys):
    for limit, status in (("1", 0), ("0", 1)):
        monkeypatch.setattr(sys, "argv", ["eval.gsm8k", *arguments(folder, "--limit", limit)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_module("eval.gsm8k", run_name="__main__", alter_sys=True)
        assert caught.value.code == status
    out, err = capsys.readouterr()
    assert "strict-match 1/1 = 100.0 %" in out
    assert err == "Error: --limit must be at least 1, not 0.\n"
