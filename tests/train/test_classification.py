"""Training on tasks that are no text, from flags to metrics: on any ranks, at any ZeRO stage."""

import functools
import json
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from gem_ds.data.encode import encode_candidates
from gem_ds.data.pairs import encode_pairs
from gem_ds.data.tasks import Kind
from gem_ds.files.apply import apply_delta
from gem_ds.files.delta import Delta
from gem_ds.models.encoders import head_names, initialise_head, set_head
from gem_ds.models.objective import predict_candidates, summed_pair_loss
from gem_ds.train import main as train
from gem_ds.train.arguments import parse_arguments
from gem_ds.train.main import RunResult
from gem_ds.train.prepare import PreparedRun, prepare
from tests.ranks import run_ranks
from tests.runs import rows_of
from tests.tiny_model import REPOSITORY, Tiny, joined, one_rank
from tests.tiny_tasks import NAMES, make_bert, make_encoder, make_task, task_of

pytestmark = pytest.mark.slow  # starts engines or programs


@dataclass(frozen=True)
class Case:
    """One training; the last batch of an epoch, and of the held-out examples, has one example."""

    kind: Kind
    model: str
    stage: int
    loss: str = "tokens"

    def __str__(self) -> str:
        return f"{self.model} {self.kind} {self.loss} zero{self.stage}"


#: What their runs are told of the layers to adapt.
OTHER_ENCODERS = {"roberta": None, "deberta-v2": None, "modernbert": "Wqkv"}

CASES = [
    *(Case(kind, "bert", 0) for kind in ("labels", "choices", "number")),
    Case("labels", "bert", 3),
    Case("choices", "model", 3, "candidates"),
    Case("labels", "model", 3),
    Case("number", "model", 0),
    Case("labels", "bert_without_pooler", 3),
    *(Case("labels", encoder, 3) for encoder in OTHER_ENCODERS),
]


@pytest.fixture(scope="module")
def tiny(tiny: Tiny) -> Tiny:
    make_bert(tiny.folder / "bert")
    make_bert(tiny.folder / "bert_without_pooler", has_pooler=False)
    for encoder in OTHER_ENCODERS:
        make_encoder(tiny.folder / encoder, encoder, AutoModelForMaskedLM)  # as they are published
    return tiny


def flags(tiny: Tiny, case: Case, folder: str, world_size: int, *switches: str, **more: object):
    return tiny.flags(
        tiny.folder / f"{folder}_{world_size}_{case}".replace(" ", "_"),
        *switches,
        **{
            "model_name_or_path": tiny.folder / case.model,
            "task": NAMES.get(case.kind, "gsm8k"),
            "classification_loss": None if case.loss == "tokens" else case.loss,
            "deepspeed": REPOSITORY / "ds_configs" / f"zero{case.stage}.json",
            "target_modules": OTHER_ENCODERS.get(case.model),
            "calibration_head_steps": 5 if "bert" in case.model else None,
            "max_length": 40 if "bert" in case.model else 128,
            "per_device_train_batch_size": 4 // world_size,
            "per_device_eval_batch_size": 2,
            "train_examples": 9,
            "max_steps": 3,
            "logging_steps": 1,
        }
        | more,
    )


def _train_all(tiny: Tiny, world_size: int) -> dict[Case, RunResult]:
    results = {}
    with joined(), redirect_stdout(StringIO()):
        for case in CASES:
            with task_of(case.kind):
                results[case] = train.main(flags(tiny, case, "out", world_size))
    return results


Trained = Callable[[int, Case], RunResult]
"""World size and case to what the run has come to."""


@pytest.fixture(scope="module")
def trained(tiny: Tiny) -> Trained:
    run = functools.cache(lambda size: run_ranks(size, _train_all, tiny, size, timeout=600)[0])
    return lambda size, case: run(size)[case]


def losses(result: RunResult) -> list[float]:
    lines = result.log_history
    return [line[key] for line in lines for key in ("loss", "eval_loss") if key in line]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_train_as_one_does(trained, case):
    """A mean over ranks or micro-batches, or a rank without rows that adds something, would show.

    With 9 training and 5 held-out examples in batches of 4 a rank has none in some batches.
    """
    alone, together = trained(1, case), trained(2, case)
    assert len(losses(alone)) > 4
    assert losses(together) == pytest.approx(losses(alone), rel=2e-4)
    assert together.metrics == pytest.approx(alone.metrics, rel=1e-3)
    assert bool(alone.metrics) == (case.kind != "number" or "bert" in case.model)


def test_stages_train_alike(trained):
    """The head's first values are the same whether weights are partitioned or not."""
    whole, partitioned = (losses(trained(2, Case("labels", "bert", stage))) for stage in (0, 3))
    assert partitioned == pytest.approx(whole, rel=2e-4)


@pytest.mark.parametrize("kind", ["labels", "choices", "number"])
def test_an_encoder_starts_with_the_head_of_its_seed(tiny, trained, kind):
    task, folder = make_task(kind), tiny.folder / "bert"
    config = AutoConfig.from_pretrained(folder)
    set_head(config, "bert", task)
    model = AutoModelForSequenceClassification.from_pretrained(folder, config=config).eval()
    new = [name for name in head_names(model) if "classifier" in name]
    initialise_head(model, new, config.initializer_range, seed=42)
    dataset = encode_pairs(task.test, AutoTokenizer.from_pretrained(folder), 40)
    with torch.no_grad():
        loss = summed_pair_loss(model, dataset.collate(range(5), 0)) / 5
    found = trained(1, Case(kind, "bert", 0)).results["first_eval_loss"]
    assert found == pytest.approx(loss.item(), rel=1e-5)


def test_predictions_are_those_of_the_trained_model(tiny, trained):
    """Of base plus delta; right or wrong by example, and their mean is the accuracy."""
    result = trained(2, Case("choices", "model", 3, "candidates"))
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval()
    apply_delta(model, Delta.load(result.delta))
    examples: list[Any] = make_task("choices").test
    dataset = encode_candidates(examples, AutoTokenizer.from_pretrained(tiny.model), 128)
    with torch.no_grad():
        expected = predict_candidates(model, dataset.collate(range(5), 0)).tolist()
    lines = rows_of(result.output_dir / "predictions.jsonl")
    assert [line["prediction"] for line in lines] == expected
    assert [line["id"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["reference"] for line in lines] == [e.answer for e in examples]
    mean = sum(line["correct"] for line in lines) / 5
    assert next(iter(result.metrics.values())) == pytest.approx(mean)
    assert "eval_metrics" in json.loads((result.output_dir / "all_results.json").read_text())


# What is settled before


def plan_of(tiny: Tiny, case: Case, *switches: str, **more: object) -> PreparedRun:
    with one_rank(), nullcontext() if case.kind == "text" else task_of(case.kind):
        return prepare(parse_arguments(flags(tiny, case, "new", 1, *switches, **more)), 1)


def test_the_head_is_no_target_and_does_not_count(tiny):
    case = Case("labels", "bert", 0)
    plan = plan_of(tiny, case, "--target_modules", "all-linear")
    model = AutoModelForSequenceClassification.from_pretrained(tiny.folder / "bert")
    assert plan.targets.num_parameters == sum(p.numel() for p in model.bert.parameters())
    assert plan.targets.names
    assert not [name for name in plan.targets.names if "classifier" in name or "pooler" in name]
    assert plan.config.id2label == {0: "entailment", 1: "not_entailment"}
    with pytest.raises(ValueError, match="matches layers of the classification head only"):
        plan_of(tiny, case, "--target_modules", "classifier")


def test_a_development_set_is_the_same_for_every_seed(tiny):
    case = Case("labels", "bert", 0)
    whole = make_task("labels").train
    plans = [
        plan_of(tiny, case, dev_examples=6, evaluate_on="dev", seed=seed, train_examples=count)
        for seed, count in ((1, None), (2, None), (1, 9))
    ]
    dev = plans[0].task.test
    assert len(dev) == len(plans[0].data.test) == 6
    assert all(plan.task.test == dev for plan in plans)
    assert [e for e in whole if e not in dev] == plans[0].task.train == plans[1].task.train
    assert len(plans[2].data.train) == 9
    assert all(example in plans[0].task.train for example in plans[2].task.train)
    assert plan_of(tiny, case, dev_examples=6).task.test == make_task("labels").test
    with pytest.raises(ValueError, match="leaves none of the 21 training examples"):
        plan_of(tiny, case, dev_examples=21)


CANDIDATES = "for causal models on tasks with candida"
REFUSED: list[tuple[Case, dict[str, object], str]] = [
    (Case("number", "model", 0, "candidates"), {}, CANDIDATES),
    (Case("labels", "bert", 0, "candidates"), {}, CANDIDATES),
    (Case("labels", "bert", 0), {"packing": True}, "answers are written"),
    (Case("labels", "bert", 0), {"max_length": 3}, "special tokens around a pair"),
    (Case("labels", "bert", 0), {"evaluate_on": "dev"}, "pass --dev_examples"),
    (Case("text", "bert", 0), {}, r"bert is an encoder \(bert\), whose tokens see the answer"),
]


def test_what_does_not_fit_is_refused(tiny):
    for case, more, sentence in REFUSED:
        with pytest.raises(ValueError, match=sentence):
            plan_of(tiny, case, **more)
