"""The vLLM adapter against a module that has the parts of vLLM's interface which it uses.

It shows that requests, parameters and answers are carried over; whether vLLM itself still has this
interface only a machine with vLLM can show.
"""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import pytest

from gem_ds.evaluate import sampling
from gem_ds.evaluate.arguments import SamplingArguments
from gem_ds.evaluate.generation import GenerationSettings, sample_seed
from gem_ds.evaluate.sampling import sample_all
from tests.tiny_model import make_tiny

PROMPTS = {"task/0": "Say 0", "task/1": "Say so so 1", "task/2": "Say so 2"}
DRAWN = GenerationSettings(
    max_new_tokens=300, stop_strings=("zz", "</s>"), temperature=0.8, top_p=0.95, seed=5
)


@dataclass(kw_only=True)
class FakeParameters:
    """Takes what `vllm.SamplingParams` is given, and nothing else."""

    temperature: float
    top_p: float
    max_tokens: int
    stop: list[str]
    stop_token_ids: list[int]
    seed: int | None


@dataclass(kw_only=True)
class FakeOutput:
    """One of a request's outputs, with the names that vLLM uses."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: str | int | None


@dataclass
class FakeRequestOutput:
    """A request's outputs."""

    outputs: list[FakeOutput]


class FakeLLM:
    """Answers with the request's seed, and ends each answer in another way."""

    made: ClassVar[list["FakeLLM"]] = []
    ENDS = (("stop", "zz"), ("stop", None), ("stop", 1), ("stop", 257)) + 9 * (("length", None),)

    def __init__(self, *, model, revision, dtype, tensor_parallel_size) -> None:
        self.options = (model, revision, dtype, tensor_parallel_size)
        self.asked: list[tuple[list[int], FakeParameters]] = []
        self.made.append(self)

    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert use_tqdm is False
        self.asked += [
            (prompt["prompt_token_ids"], parameters)
            for prompt, parameters in zip(prompts, sampling_params, strict=True)
        ]
        return [
            FakeRequestOutput(
                [
                    FakeOutput(
                        text=f" {parameters.seed}",
                        token_ids=(1, 2, 3),
                        finish_reason=reason,
                        stop_reason=stop,
                    )
                ]
            )
            for parameters, (reason, stop) in zip(sampling_params, self.ENDS, strict=False)
        ]


@pytest.fixture
def tiny(tmp_path):
    return make_tiny(tmp_path)


def run(tiny, settings=DRAWN, **changes):
    options = {"model_name_or_path": str(tiny.model), "output_dir": str(tiny.folder / "out")}
    arguments = SamplingArguments(backend="vllm", dtype="bfloat16", **options | changes)
    return sample_all(arguments, PROMPTS, settings, num_samples=2)


@pytest.fixture
def fake(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, FakeParameters
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(FakeLLM, "made", [])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)


def test_requests_are_carried_to_vllm_and_its_answers_back(tiny, fake, monkeypatch):
    monkeypatch.setattr(sampling, "load_weights", None)
    samples = run(tiny)
    (model,) = FakeLLM.made
    assert model.options == (str(tiny.model), "main", "bfloat16", 4)
    keys = [(task_id, number) for task_id in PROMPTS for number in range(2)]
    for (ids, parameters), key in zip(model.asked, keys, strict=True):
        assert len(ids) == len(PROMPTS[key[0]])  # a token per byte
        assert parameters == FakeParameters(
            temperature=0.8,
            top_p=0.95,
            max_tokens=128 - len(ids),  # where the model's positions end
            stop=["zz", "</s>"],
            stop_token_ids=[1],  # a special token, which vLLM leaves out of the text
            seed=sample_seed(5, key),
        )
    assert [sample.key for sample in samples] == keys
    assert [sample.completion for sample in samples] == [f" {sample_seed(5, key)}" for key in keys]
    assert [sample.finish_reason for sample in samples] == [
        *("stop", "eos", "stop", "eos", "length", "length"),
    ]
    assert {sample.num_tokens for sample in samples} == {3}
    assert samples[0].settings["backend"] == "vllm"


def test_greedy_needs_no_seed(tiny, fake):
    run(tiny, GenerationSettings(max_new_tokens=4, stop_strings=()))
    assert {parameters.seed for _, parameters in FakeLLM.made[0].asked} == {None}


def test_samples_of_another_backend_are_not_continued(tiny, fake):
    run(tiny)
    with pytest.raises(ValueError, match='with backend "vllm" and not "transformers"'):
        sample_all(
            SamplingArguments(
                model_name_or_path=str(tiny.model),
                output_dir=str(tiny.folder / "out"),
                dtype="bfloat16",
            ),
            PROMPTS,
            DRAWN,
            num_samples=2,
        )


def test_without_vllm_one_sentence_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with pytest.raises(ValueError, match="--backend vllm needs vLLM") as caught:
        run(tiny)
    assert "pip install 'gem_ds[vllm]'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tiny.folder / "out" / "samples.jsonl").exists()
