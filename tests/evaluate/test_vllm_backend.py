"""The vLLM adapter against a module that has the parts of vLLM's interface which it uses.

It shows that requests, parameters and answers are carried over; whether vLLM itself still has this
interface only a machine with vLLM can show.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from gem_ds import apply_delta
from gem_ds.evaluate import model
from gem_ds.evaluate.generation import GenerationSettings, sample_seed
from tests.deltas import bits
from tests.serving.engine import LLM
from tests.serving.test_delta_set import random_delta
from tests.tiny_evaluation import draw, refusal
from tests.tiny_model import make_tiny

PROMPTS = {"task/0": "Say 0", "task/1": "Say so so 1", "task/2": "Say so 2"}
DRAWN = GenerationSettings(
    max_new_tokens=300, stop_strings=("zz", "</s>"), temperature=0.8, top_p=0.95, seed=5
)
ENDS = [("stop", "zz"), ("stop", None), ("stop", 1), ("stop", 257), *9 * [("length", None)]]


class FakeLLM(LLM):
    """Answers with the request's seed, and ends each answer in another way."""

    def __init__(
        self,
        *,
        model,
        revision,
        dtype,
        trust_remote_code,
        tensor_parallel_size,
        worker_extension_cls,
    ) -> None:
        assert trust_remote_code is False
        if worker_extension_cls:
            base = LlamaForCausalLM.from_pretrained(model, dtype=dtype)
            super().__init__(base, 2, worker_extension_cls)
        self.options = (model, revision, dtype, tensor_parallel_size)
        self.asked = []
        self.made.append(self)

    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert use_tqdm is False
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        self.asked += zip(ids, sampling_params, strict=True)
        outputs = [
            {"text": f" {parameters['seed']}", "token_ids": (1, 2, 3)}
            | {"finish_reason": reason, "stop_reason": stop}
            for parameters, (reason, stop) in zip(sampling_params, ENDS, strict=False)
        ]
        return [SimpleNamespace(outputs=[SimpleNamespace(**output)]) for output in outputs]


@pytest.fixture
def tiny(tmp_path):
    return make_tiny(tmp_path)


@pytest.fixture
def made(monkeypatch):
    """The models that vLLM was asked for."""
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, dict
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(FakeLLM, "made", [], raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    return FakeLLM.made


def run(tiny, settings=DRAWN, backend="vllm", delta=None):
    options = {"backend": backend, "dtype": "bfloat16", "settings": settings, "delta": delta}
    return draw(tiny.model, tiny.folder / "out", PROMPTS, 2, **options)


def test_requests_are_carried_to_vllm_and_its_answers_back(tiny, made, monkeypatch):
    monkeypatch.setattr(model, "load_weights", None)
    samples = run(tiny)
    (llm,) = made
    assert llm.options == (str(tiny.model), "main", "bfloat16", 4)
    keys = [(task_id, number) for task_id in PROMPTS for number in range(2)]
    for (ids, parameters), key in zip(llm.asked, keys, strict=True):
        assert len(ids) == len(PROMPTS[key[0]])  # a token per byte
        assert parameters == {
            "temperature": 0.8,
            "top_p": 0.95,
            "max_tokens": 128 - len(ids),  # where the model's positions end
            "stop": ["zz", "</s>"],
            "stop_token_ids": [1],  # a special token, which vLLM leaves out of the text
            "seed": sample_seed(5, key),
        }
    assert [sample.key for sample in samples] == keys
    assert [sample.completion for sample in samples] == [f" {sample_seed(5, key)}" for key in keys]
    reasons = [sample.finish_reason for sample in samples]
    assert reasons == ["stop", "eos", "stop", "eos", "length", "length"]
    assert {sample.num_tokens for sample in samples} == {3}
    assert samples[0].settings["backend"] == "vllm"
    told = refusal(run, tiny, backend="transformers")
    assert 'with backend "vllm" and not "transformers"' in told


def test_the_end_of_a_turn_stops_vllm(tiny, made):
    """A token of the template that is no special one by name, and whose text vLLM may not see."""
    template = "{% for m in messages %}{{ m.role }}{{ m.content }}<s>\n{% endfor %}"
    asked = {"a": [{"role": "user", "content": "b"}]}
    options = {"backend": "vllm", "dtype": "bfloat16", "settings": DRAWN}
    draw(tiny.speaking("chat", template), tiny.folder / "out", asked, 1, **options)
    (parameters,) = (parameters for _, parameters in made[0].asked)
    assert parameters["stop"] == ["zz", "</s>", "<s>"]
    assert parameters["stop_token_ids"] == [1, 0]


def test_a_delta_is_put_into_what_vllm_has_loaded(tiny, made):
    base = LlamaForCausalLM.from_pretrained(tiny.model, dtype=torch.bfloat16)
    delta = random_delta(base, 0)
    delta.save(tiny.folder / "delta.safetensors")
    run(tiny, delta=str(tiny.folder / "delta.safetensors"))
    apply_delta(base, delta)
    (llm,) = made
    expected = LLM(base, 2)
    for worker, other in zip(llm.workers, expected.workers, strict=True):
        assert bits(worker.get_model()) == bits(other.get_model())


def test_greedy_needs_no_seed(tiny, made):
    run(tiny, GenerationSettings(max_new_tokens=4, stop_strings=()))
    assert {parameters["seed"] for _, parameters in made[0].asked} == {None}


def test_without_vllm_one_sentence_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    told = refusal(run, tiny)
    assert told.startswith("--backend vllm needs vLLM")
    assert "pip install 'gem_ds[vllm]'" in told
    assert not (tiny.folder / "out" / "samples.jsonl").exists()
