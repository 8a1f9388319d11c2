"""The evaluator of chosen answers, on causal models and encoders, with deltas and adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, ShiraConfig, TaskType, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from gem_ds.data.encode import encode_pairs
from gem_ds.data.metrics import text_exact_match, text_f1
from gem_ds.data.tasks import AnswerExample, Example, Kind, TaskData, load_task
from gem_ds.distributed import process_group
from gem_ds.evaluate import classification, gsm8k, squad
from gem_ds.files.delta import Delta
from gem_ds.files.mask import Mask, WeightInfo, checksum
from gem_ds.models.choices import predict_pairs
from gem_ds.models.encoders import head_names, initialise_head, set_head
from gem_ds.models.load import load_weights, open_model
from tests.ranks import run_ranks
from tests.tiny_model import REPOSITORY, Tiny, make_tiny
from tests.tiny_tasks import NAMES, bert_tokenizer, make_bert, make_task

pytestmark = [
    pytest.mark.slow,  # starts engines or programs
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft,
]

ZERO3 = str(REPOSITORY / "ds_configs" / "zero3.json")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = make_tiny(tmp_path_factory.mktemp("tiny"))
    make_bert(tiny.folder / "bert")
    return tiny


@contextmanager
def asked(kind: Kind) -> Iterator[None]:
    """The evaluators find these examples, whatever task they name."""
    task = make_task(kind, num_test=11)
    with mock.patch.object(classification, "load_task", return_value=task):
        yield


def evaluate(tiny: Tiny, kind: Kind, model: str, name: str, *more: str) -> dict[str, Any]:
    """results.json, after a look at predictions.jsonl."""
    folder = tiny.folder / name
    with asked(kind):
        return classification.main(
            [
                *("--task", NAMES[kind], "--model_name_or_path", str(tiny.folder / model)),
                *("--output_dir", str(folder), "--batch_size", "2", "--disable_tqdm", *more),
            ]
        )


def predictions(tiny: Tiny, name: str) -> list[float]:
    lines = (tiny.folder / name / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def headed(tiny: Tiny, kind: Kind, seed: int) -> Any:
    """The BERT with the head of a seed."""
    config = AutoConfig.from_pretrained(tiny.folder / "bert")
    set_head(config, "bert", make_task(kind))
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny.folder / "bert", config=config
    ).eval()
    initialise_head(model, [n for n in head_names(model) if "classifier" in n], 0.5, seed)
    return model


def save_delta(tiny: Tiny, kind: Kind, seed: int = 6) -> Path:
    """A delta that moves some entries of one weight, and carries a head."""
    model = headed(tiny, kind, seed)
    name, index = "bert.encoder.layer.0.attention.self.value.weight", torch.arange(0, 40, 2)
    base = model.get_parameter(name).detach().flatten()[index]
    info = WeightInfo(shape=(24, 24), dtype="float32", checksum=checksum(base))
    mask = Mask(
        indices={name: index.int()},
        weights={name: info},
        base_model="bert",
        revision=None,
        settings={},
    )
    head = {n: model.get_parameter(n).detach() for n in head_names(model) if "classifier" in n}
    path = tiny.folder / f"{kind}{seed}.safetensors"
    Delta(mask=mask, values={name: base + 1}, head=head).save(path)
    return path


@pytest.mark.parametrize("kind", ["labels", "choices", "number"])
def test_an_encoder_takes_its_head_from_the_delta(tiny: Tiny, kind: Kind) -> None:
    delta = save_delta(tiny, kind)
    results = evaluate(tiny, kind, "bert", f"encoder_{kind}", "--delta", str(delta))
    model = headed(tiny, kind, seed=6)
    with torch.no_grad():
        values = Delta.load(delta).values
        for name, value in values.items():
            model.get_parameter(name).view(-1)[torch.arange(0, 40, 2)] = value
        task = make_task(kind, num_test=11)
        dataset = encode_pairs(task.test, bert_tokenizer(), 40)
        expected = predict_pairs(model, dataset.collate(range(11), 0)).tolist()
    assert predictions(tiny, f"encoder_{kind}") == pytest.approx(expected, rel=1e-4)
    assert results["n"] == 11
    assert "head" in results["protocol"]
    assert (
        results["max_length"]
        == AutoConfig.from_pretrained(tiny.folder / "bert").max_position_embeddings
    )  # fewer than the flag's default
    assert results["delta_sha256"]
    on_disk = json.loads((tiny.folder / f"encoder_{kind}" / "results.json").read_text())
    assert on_disk == results


def _on_ranks(tiny: Tiny) -> None:
    delta = ["--delta", str(tiny.folder / "number6.safetensors")]
    with mock.patch.object(
        process_group, "leave_distributed"
    ):  # joining takes longer than these runs
        for suffix, flags in (("", []), ("3", ["--deepspeed", ZERO3])):
            evaluate(tiny, "choices", "model", f"ranks_causal{suffix}", *flags)
            evaluate(tiny, "number", "bert", f"ranks_encoder{suffix}", *flags, *delta)
    process_group.leave_distributed()


def test_any_number_of_ranks_predicts_the_same(tiny: Tiny) -> None:
    """11 examples in batches of 2: a rank has none left in the last round."""
    delta = save_delta(tiny, "number")
    run_ranks(2, _on_ranks, tiny)
    evaluate(tiny, "choices", "model", "alone_causal")
    evaluate(tiny, "number", "bert", "alone_encoder", "--delta", str(delta))
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


def test_an_adapter_brings_its_layers_and_its_head(tiny: Tiny) -> None:
    folder = tiny.folder / "bert_adapter"
    adapted = save_adapter(headed(tiny, "labels", 6), folder, TaskType.SEQ_CLS, ["query", "value"])
    results = evaluate(tiny, "labels", "bert", "adapted", "--adapter", str(folder))
    dataset = encode_pairs(make_task("labels", num_test=11).test, bert_tokenizer(), 40)
    with torch.no_grad():
        expected = predict_pairs(adapted, dataset.collate(range(11), 0)).tolist()
    assert predictions(tiny, "adapted") == expected
    assert set(results["adapter_sha256"]) == {"adapter_config.json", "adapter_model.safetensors"}


def test_an_adapter_generates(tiny: Tiny) -> None:
    folder = tiny.folder / "llama_adapter"
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    save_adapter(model, folder, TaskType.CAUSAL_LM, ["q_proj", "v_proj", "o_proj", "up_proj"])
    command = ["--model_name_or_path", str(tiny.model), "--data_dir", str(tiny.data)]
    command += ["--max_new_tokens", "12", "--disable_tqdm"]
    gsm8k.main([*command, "--output_dir", str(tiny.folder / "g1")])
    gsm8k.main([*command, "--output_dir", str(tiny.folder / "g2"), "--adapter", str(folder)])
    written = [
        [json.loads(line)["completion"] for line in path.read_text().splitlines()]
        for path in (tiny.folder / name / "samples.jsonl" for name in ("g1", "g2"))
    ]
    assert len(written[0]) == len(written[1]) == 5
    assert written[0] != written[1]


@pytest.mark.parametrize("is_half", [True, False])
@pytest.mark.parametrize("method", ["lora", "shira"])
def test_an_adapter_keeps_the_precision_of_its_training(
    tiny: Tiny, method: str, is_half: bool
) -> None:
    """Beside a base in fp32 files, where its training was in 16 bits; an fp32 one stays so."""
    folder = tiny.folder / f"{method}_{is_half}"
    model = AutoModelForCausalLM.from_pretrained(
        tiny.model, dtype=torch.bfloat16 if is_half else torch.float32
    )
    of_method: Any = {"lora": LoraConfig, "shira": ShiraConfig}[method]
    config = of_method(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"], r=2)
    get_peft_model(model, config, autocast_adapter_dtype=False).save_pretrained(folder)
    files = open_model(str(tiny.model), adapter=str(folder), dtype="auto")
    found = {p.dtype for p in load_weights(files, torch.device("cpu")).parameters()}
    assert found == {torch.bfloat16 if is_half else torch.float32}
    half = open_model(str(tiny.model), adapter=str(folder), dtype="bfloat16")
    loaded = dict(load_weights(half, torch.device("cpu")).named_parameters())
    adapter = {p.dtype for name, p in loaded.items() if f"{method}_" in name}
    assert adapter == {torch.bfloat16 if is_half else torch.float32}


def test_short_answers_are_the_rest_of_the_line(tiny: Tiny) -> None:
    task = make_task("number")
    command = ["--task", "stsb", "--model_name_or_path", str(tiny.model), "--disable_tqdm"]
    with mock.patch.object(squad, "load_task", return_value=task):
        results = squad.main([*command, "--output_dir", str(tiny.folder / "short")])
    lines = (tiny.folder / "short" / "samples.jsonl").read_text().splitlines()
    assert results["n"] == len(lines) == 5
    assert not any("\n" in json.loads(line)["completion"] for line in lines)


def test_each_answer_is_judged_by_itself_too(tiny: Tiny) -> None:
    prompts = ["a b", "c d", "e f"]
    examples: list[Example] = [
        AnswerExample(prompt=prompt, target=" e f", answers=("e f", "d"), passage="p")
        for prompt in prompts
    ]
    out = tiny.folder / "squad"
    command = ["--model_name_or_path", str(tiny.model), "--disable_tqdm", "--output_dir", str(out)]
    with mock.patch.object(squad, "load_task", return_value=TaskData(train=[], test=examples)):
        results = squad.main(command)
    samples, verdicts = (
        [json.loads(line) for line in (out / name).read_text().splitlines()]
        for name in ("samples.jsonl", "verdicts.jsonl")
    )
    assert [v["task_id"] for v in verdicts] == [s["task_id"] for s in samples]
    for sample, verdict in zip(samples, verdicts, strict=True):
        answers = [sample["completion"].strip()]
        assert verdict["f1"] == text_f1(examples[:1], answers)
        assert verdict["exact_match"] == text_exact_match(examples[:1], answers)
    for name, value in results["metrics"].items():
        assert value == pytest.approx(sum(v[name] for v in verdicts) / 3)


def test_what_does_not_fit_is_refused_in_a_sentence(tiny: Tiny) -> None:
    def refusal(*flags: str, kind: Kind = "labels", model: str = "model") -> str:
        with pytest.raises(ValueError, match=r"[.:]") as stop:
            evaluate(tiny, kind, model, "refused", *flags)
        assert not (tiny.folder / "refused").exists()
        assert "\n" not in str(stop.value)
        return str(stop.value)

    adapters = {}
    for name, width in (("other_size", 16), ("other_names", 32)):
        config = AutoConfig.from_pretrained(tiny.model, hidden_size=width)
        if name == "other_names":
            config.num_hidden_layers = 1
        model = AutoModelForCausalLM.from_config(config)
        adapters[name] = str(tiny.folder / name)
        save_adapter(model, Path(adapters[name]), TaskType.CAUSAL_LM, ["q_proj"])
    prompt = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    get_peft_model(model, prompt).save_pretrained(tiny.folder / "prompt")

    assert "does not fit the model" in refusal("--adapter", adapters["other_size"])
    assert "does not fit the model" in refusal("--adapter", adapters["other_names"])
    assert "learnt prompt" in refusal("--adapter", str(tiny.folder / "prompt"))
    assert "holds no adapter_config.json" in refusal("--adapter", str(tiny.folder))
    assert "not both" in refusal("--adapter", adapters["other_size"], "--delta", "x")
    assert "leave --deepspeed out" in refusal("--adapter", "x", "--deepspeed", ZERO3)
    assert "written by a causal model" in refusal(kind="number")
    assert "lacks 2 of the weights" in refusal(model="bert")
    three = replaced_labels(tiny)
    assert "task head" in refusal("--delta", str(three), model="bert")
    with (
        mock.patch.object(
            classification, "load_task", return_value=load_task("gsm8k", data_dir=str(tiny.data))
        ),
        pytest.raises(ValueError, match="is an encoder"),
    ):
        classification.main(
            [
                *("--task", "gsm8k", "--model_name_or_path", str(tiny.folder / "bert")),
                *("--output_dir", str(tiny.folder / "refused")),
            ]
        )
    assert "1 of the 11 examples have candidates that do not" in refusal("--max_length", "58")
    head = ["--delta", str(save_delta(tiny, "labels"))]
    assert evaluate(tiny, "labels", "bert", "cut", "--max_length", "8", *head)["num_truncated"] > 0
    evaluate(tiny, "labels", "model", "twice")
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        evaluate(tiny, "labels", "model", "twice")
    evaluate(tiny, "labels", "model", "twice", "--overwrite_output_dir")


def test_a_batch_beyond_the_memory_says_what_to_lower(tiny: Tiny) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
    with (
        mock.patch("gem_ds.evaluate.classification.predict_all", side_effect=full),
        pytest.raises(ValueError, match=r"a batch of 2 examples and .*: lower --batch_size\.$"),
    ):
        evaluate(tiny, "labels", "model", "full")


def test_the_output_folder_is_tried_before_the_pass(tiny: Tiny) -> None:
    (tiny.folder / "file").write_text("")
    with (
        mock.patch(
            "gem_ds.evaluate.classification.predict_all", side_effect=AssertionError("it ran")
        ),
        pytest.raises(OSError, match="name a folder that is below no file"),
    ):
        evaluate(tiny, "labels", "model", "file/below")


def replaced_labels(tiny: Tiny) -> Path:
    """A delta whose head is that of another number of labels."""
    return save_delta(tiny, "number", seed=3)
