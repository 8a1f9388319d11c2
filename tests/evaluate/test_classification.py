"""The evaluator of chosen answers, on causal models and encoders, with deltas and adapters."""

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, ShiraConfig, TaskType, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from gem_ds.data.metrics import text_exact_match, text_f1
from gem_ds.data.pairs import encode_pairs
from gem_ds.data.tasks import AnswerExample, Kind, TaskData, load_task
from gem_ds.distributed import process_group
from gem_ds.evaluate import classification, gsm8k, squad
from gem_ds.files.delta import Delta
from gem_ds.models.encoders import head_names, initialise_head, set_head
from gem_ds.models.load import load_weights, open_model
from gem_ds.models.objective import predict_pairs
from tests.ranks import run_ranks
from tests.runs import rows_of
from tests.tiny_evaluation import refusal, save_delta
from tests.tiny_model import REPOSITORY, Tiny
from tests.tiny_tasks import NAMES, bert_tokenizer, make_bert, make_task

pytestmark = pytest.mark.slow  # starts engines or programs

ZERO3 = str(REPOSITORY / "ds_configs" / "zero3.json")
MOVED = torch.arange(0, 40, 2)


@pytest.fixture(scope="module")
def tiny(tiny: Tiny) -> Tiny:
    make_bert(tiny.folder / "bert")
    return tiny


def evaluate(tiny: Tiny, kind: Kind, model: str, name: str, *more: str) -> dict[str, Any]:
    """results.json of an evaluation on eleven examples of a kind."""
    command = ["--task", NAMES[kind], "--model_name_or_path", str(tiny.folder / model)]
    command += ["--output_dir", str(tiny.folder / name), "--batch_size", "2", *more]
    task = make_task(kind, num_test=11)
    with mock.patch.object(classification, "load_task", return_value=task):
        return classification.main(command)


def predictions(tiny: Tiny, name: str) -> list[float]:
    return [row["prediction"] for row in rows_of(tiny.folder / name / "predictions.jsonl")]


def headed(tiny: Tiny, kind: Kind, seed: int = 6) -> Any:
    """The BERT with the head of a seed."""
    config = AutoConfig.from_pretrained(tiny.folder / "bert")
    set_head(config, "bert", make_task(kind))
    auto_class = AutoModelForSequenceClassification
    model = auto_class.from_pretrained(tiny.folder / "bert", config=config).eval()
    initialise_head(model, [n for n in head_names(model) if "classifier" in n], 0.5, seed)
    return model


def save_headed(tiny: Tiny, kind: Kind) -> str:
    """A delta that moves some entries of one weight, and carries a head."""
    model, path = headed(tiny, kind), tiny.folder / f"{kind}.safetensors"
    head = {n: model.get_parameter(n).detach() for n in head_names(model) if "classifier" in n}
    name = "bert.encoder.layer.0.attention.self.value.weight"
    save_delta(path, model, {name: (MOVED, torch.ones(20))}, head)
    return str(path)


def expected_of(model: Any, kind: Kind) -> list[float]:
    dataset = encode_pairs(make_task(kind, num_test=11).test, bert_tokenizer(), 40)
    with torch.no_grad():
        found: list[float] = predict_pairs(model, dataset.collate(range(11), 0)).tolist()
    return found


@pytest.mark.parametrize("kind", ["labels", "choices", "number"])
def test_an_encoder_takes_its_head_from_the_delta(tiny, kind, capsys):
    delta, name = save_headed(tiny, kind), f"encoder_{kind}"
    capsys.readouterr()
    results = evaluate(tiny, kind, "bert", name, "--delta", delta)
    assert capsys.readouterr().err == "", "no bar is drawn into a log file"
    model = headed(tiny, kind)
    with torch.no_grad():
        for weight, value in Delta.load(delta).values.items():
            model.get_parameter(weight).view(-1)[MOVED] = value
    assert predictions(tiny, name) == pytest.approx(expected_of(model, kind), rel=1e-4)
    assert results["n"] == 11
    assert "head" in results["protocol"]
    config = AutoConfig.from_pretrained(tiny.folder / "bert")
    assert results["max_length"] == config.max_position_embeddings  # fewer than the default
    assert results["delta_sha256"]
    order = ["task", "n", "metrics", "protocol", "model", "model_fingerprint", "delta_sha256"]
    order += ["adapter_sha256", "dtype", "max_length", "num_truncated", "data_sha256", "versions"]
    assert [*results] == [*order, "seconds"]
    assert json.loads((tiny.folder / name / "results.json").read_text()) == results


def _on_ranks(tiny: Tiny) -> None:
    delta = ["--delta", str(tiny.folder / "number.safetensors")]
    # Joining takes longer than these runs.
    with mock.patch.object(process_group, "leave_distributed"):
        for suffix, flags in (("", []), ("3", ["--deepspeed", ZERO3])):
            results = evaluate(tiny, "choices", "model", f"ranks_causal{suffix}", *flags)
            assert bool(results) == (os.environ["RANK"] == "0")
            evaluate(tiny, "number", "bert", f"ranks_encoder{suffix}", *flags, *delta)
    process_group.leave_distributed()


def test_any_number_of_ranks_predicts_the_same(tiny):
    """11 examples in batches of 2: a rank has none left in the last round."""
    delta = save_headed(tiny, "number")
    run_ranks(2, _on_ranks, tiny)
    evaluate(tiny, "choices", "model", "alone_causal")
    evaluate(tiny, "number", "bert", "alone_encoder", "--delta", delta)
    for kind in ("causal", "encoder"):
        alone = predictions(tiny, f"alone_{kind}")
        assert alone == predictions(tiny, f"ranks_{kind}"), "on whole models batches are the same"
        assert predictions(tiny, f"ranks_{kind}3") == pytest.approx(alone, rel=1e-5)
        assert len(alone) == 11
        assert len(set(alone)) > 1


def save_adapter(model: Any, folder: Path, task_type: Any, targets: list[str]) -> Any:
    """A LoRA that changes what the model says."""
    adapted = get_peft_model(
        model, LoraConfig(task_type=task_type, target_modules=targets, init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    return adapted.eval()


def test_an_adapter_brings_its_layers_and_its_head(tiny):
    folder = tiny.folder / "bert_adapter"
    adapted = save_adapter(headed(tiny, "labels"), folder, TaskType.SEQ_CLS, ["query", "value"])
    results = evaluate(tiny, "labels", "bert", "adapted", "--adapter", str(folder))
    assert predictions(tiny, "adapted") == expected_of(adapted, "labels")
    assert set(results["adapter_sha256"]) == {"adapter_config.json", "adapter_model.safetensors"}


def test_an_adapter_generates(tiny):
    folder = tiny.folder / "llama_adapter"
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    save_adapter(model, folder, TaskType.CAUSAL_LM, ["q_proj", "v_proj", "o_proj", "up_proj"])
    command = ["--model_name_or_path", str(tiny.model), "--data_dir", str(tiny.data)]
    written = []
    for name, more in (("g1", []), ("g2", ["--adapter", str(folder)])):
        out = tiny.folder / name
        gsm8k.main([*command, "--max_new_tokens", "12", "--output_dir", str(out), *more])
        written.append([row["completion"] for row in rows_of(out / "samples.jsonl")])
    assert len(written[0]) == len(written[1]) == 5
    assert written[0] != written[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["lora", "shira"])
def test_an_adapter_keeps_the_dtype_of_its_training(tiny, method, dtype):
    """Beside a base in fp32 files, where its training was in 16 bits; an fp32 one stays so."""
    folder = tiny.folder / f"{method}_{dtype}"
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=dtype)
    of_method: Any = {"lora": LoraConfig, "shira": ShiraConfig}[method]
    config = of_method(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"], r=2)
    get_peft_model(model, config, autocast_adapter_dtype=False).save_pretrained(folder)
    files = open_model(str(tiny.model), adapter=str(folder), dtype="auto")
    found = {p.dtype for p in load_weights(files, torch.device("cpu")).parameters()}
    assert found == {dtype}
    half = open_model(str(tiny.model), adapter=str(folder), dtype="bfloat16")
    loaded = dict(load_weights(half, torch.device("cpu")).named_parameters())
    assert {p.dtype for name, p in loaded.items() if f"{method}_" in name} == {dtype}


def ask(tiny: Tiny, task: TaskData, name: str, *more: str) -> dict[str, Any]:
    """results.json of short answers."""
    command = ["--model_name_or_path", str(tiny.model), "--output_dir", str(tiny.folder / name)]
    with mock.patch.object(squad, "load_task", return_value=task):
        return squad.main([*command, *more])


def test_a_short_answer_is_the_rest_of_the_line_and_judged_by_itself_too(tiny):
    assert ask(tiny, make_task("number"), "stsb", "--task", "stsb")["n"] == 5
    assert "no held-out examples" in refusal(ask, tiny, TaskData(train=[], test=[]), "none")
    examples = [
        AnswerExample(prompt=prompt, target=" e f", answers=("e f", "d"), passage="p")
        for prompt in ("a b", "c d", "e f")
    ]
    results = ask(tiny, TaskData(train=[], test=[*examples]), "squad")
    samples = rows_of(tiny.folder / "squad" / "samples.jsonl")
    verdicts = rows_of(tiny.folder / "squad" / "verdicts.jsonl")
    assert results["n"] == len(samples) == 3
    for sample, verdict in zip(samples, verdicts, strict=True):
        assert "\n" not in sample["completion"]
        answers = [sample["completion"].strip()]
        assert verdict == {
            "task_id": sample["task_id"],
            "f1": text_f1(examples[:1], answers),
            "exact_match": text_exact_match(examples[:1], answers),
        }
    for name, value in results["metrics"].items():
        assert value == pytest.approx(sum(v[name] for v in verdicts) / 3)


def test_what_does_not_fit_is_refused_in_a_sentence(tiny):
    adapters = {}
    for name, changes in (("size", {"hidden_size": 16}), ("names", {"num_hidden_layers": 1})):
        config = AutoConfig.from_pretrained(tiny.model, **changes)
        adapters[name] = str(tiny.folder / name)
        model = AutoModelForCausalLM.from_config(config)
        save_adapter(model, tiny.folder / name, TaskType.CAUSAL_LM, ["q_proj"])
    prompt = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    get_peft_model(model, prompt).save_pretrained(tiny.folder / "prompt")
    cases: list[tuple[str, list[str], Kind, str]] = [
        ("does not fit the model", ["--adapter", adapters["size"]], "labels", "model"),
        ("does not fit the model", ["--adapter", adapters["names"]], "labels", "model"),
        ("learnt prompt", ["--adapter", str(tiny.folder / "prompt")], "labels", "model"),
        ("holds no adapter_config.json", ["--adapter", str(tiny.folder)], "labels", "model"),
        ("--backend vllm is for what is generated", ["--backend", "vllm"], "labels", "model"),
        ("--max_length must be at least 1", ["--max_length", "0"], "labels", "model"),
        ("1 of the 11 examples have cand", ["--max_length", "58"], "labels", "model"),
        ("written by a causal model", [], "number", "model"),
        ("lacks 2 of the weights", [], "labels", "bert"),
        ("task head", ["--delta", save_headed(tiny, "number")], "labels", "bert"),
    ]
    for message, flags, kind, name in cases:
        assert message in refusal(evaluate, tiny, kind, name, "refused", *flags)
    task = load_task("gsm8k", data_dir=str(tiny.data))
    with mock.patch("tests.evaluate.test_classification.make_task", return_value=task):
        assert "is an encoder" in refusal(evaluate, tiny, "labels", "bert", "refused")
    assert not (tiny.folder / "refused").exists()
    head = ["--delta", save_headed(tiny, "labels")]
    assert evaluate(tiny, "labels", "bert", "cut", "--max_length", "8", *head)["num_truncated"] > 0
    evaluate(tiny, "labels", "model", "twice")
    assert "--overwrite_output_dir" in refusal(evaluate, tiny, "labels", "model", "twice")
    evaluate(tiny, "labels", "model", "twice", "--overwrite_output_dir")


def test_the_memory_and_the_output_folder_are_named(tiny):
    """The folder is tried before the pass."""
    (tiny.folder / "file").write_text("")
    full = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
    with mock.patch.object(classification, "predict_all", side_effect=full):
        told = refusal(evaluate, tiny, "labels", "model", "full")
        assert told.endswith("and all their candidates: lower --batch_size.")
        assert "a batch of 2 examples" in told
        told = refusal(evaluate, tiny, "labels", "model", "file/below")
        assert "name a folder that is below no file" in told
