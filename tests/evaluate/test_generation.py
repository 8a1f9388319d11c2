"""Batched generation against one prompt at a time without a cache, and against scripted models."""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)

from gem_ds.data.encode import encode_prompt
from gem_ds.evaluate.decoding import Transformers
from gem_ds.evaluate.generation import GenerationSettings, make_batches, make_requests, uniform
from gem_ds.models.load import ModelFiles, load_weights, open_model
from tests.tiny_evaluation import one_layer, refusal, save_delta
from tests.tiny_tokenizers import byte_level, save_sentencepiece

CPU = torch.device("cpu")
PROMPTS = ["a", "Question: why?", "bc", "How many clips are in 12 boxes?", "", "é €", "a", "zz top"]


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory) -> LlamaTokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = ["Question: How many clips?", "Answer: 48", "ab ba"] * 20
    return LlamaTokenizer.from_pretrained(save_sentencepiece(folder, lines, vocab_size=300))


@pytest.fixture(params=["byte-level", "sentencepiece"])
def tokenizer(request, sentencepiece_tokenizer):
    return byte_level() if request.param == "byte-level" else sentencepiece_tokenizer


def tiny_model(architecture: str, **options):
    """A random fp32 model whose logits are far enough apart for an argmax to be no matter of luck.

    Many tokens end an answer, so that the rows of a batch end at different times.
    """
    own = {
        "llama": {"intermediate_size": 32, "initializer_range": 0.5},
        "opt": {"ffn_dim": 16, "word_embed_proj_dim": 16, "init_std": 0.5},
    }
    sizes = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(3)
    config = AutoConfig.for_model(architecture, **sizes, **own[architecture], **options)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = list(range(1, 258, 10))
    return model.eval()


DRAWN = {"temperature": 1.3, "top_p": 0.8, "seed": 4}


def drawn_by_hand(logits, task_id: str, position: int) -> int:
    """The definition of `gem_ds.evaluate.decoding` word for word, in plain Python."""
    shares = [math.exp(logit / DRAWN["temperature"]) for logit in logits.tolist()]
    total, kept = sum(shares), set()
    for token in sorted(range(len(shares)), key=lambda token: -shares[token]):
        if sum(shares[other] for other in kept) >= DRAWN["top_p"] * total:
            break
        kept.add(token)
    goal = uniform(DRAWN["seed"], (task_id, 0), position) * sum(shares[token] for token in kept)
    reached = 0.0
    for token in sorted(kept):
        reached += shares[token]
        if reached >= goal:
            return token
    raise AssertionError("the shares add up to more than the goal")


@torch.no_grad()
def one_at_a_time(model, tokenizer, prompt: str, limit: int, num_positions: int, task_id=None):
    """The oracle: no batch, no padding, no cache. Returns the text, the tokens' number, the end.

    Greedy, or with a task id drawn by hand.
    """
    start = encode_prompt(prompt, tokenizer)
    ids = list(start)

    def text_of(new_ids):
        return tokenizer.decode(new_ids, skip_special_tokens=True)

    eos = {tokenizer.eos_token_id, *model.generation_config.eos_token_id}
    while len(ids) - len(start) < limit and len(ids) < num_positions:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        if task_id is None:
            ids.append(int(logits.argmax()))
        else:
            ids.append(drawn_by_hand(logits, task_id, len(ids) - len(start)))
        if ids[-1] in eos:
            return text_of(ids[len(start) : -1]), len(ids) - len(start), "eos"
    return text_of(ids[len(start) :]), len(ids) - len(start), "length"


def complete(model, tokenizer, prompts, *, max_new_tokens=12, stop=(), batch_size=3, **drawn):
    wanted = GenerationSettings(max_new_tokens=max_new_tokens, stop_strings=tuple(stop), **drawn)
    told = {"name": "model", "revision": "main", "dtype": "float32", "delta": None}
    files = ModelFiles(config=model.config, tokenizer=tokenizer, **told)
    named = {f"number {i}": prompt for i, prompt in enumerate(prompts)}
    requests = make_requests(files, named, [(name, 0) for name in named], max_new_tokens)
    backend = Transformers(model, tokenizer, wanted, batch_size=batch_size)
    found = {}
    for group in make_batches(requests, batch_size):
        for batch in group:
            assert len(batch) <= batch_size
            found |= zip([r.key[0] for r in batch], backend.complete(batch), strict=True)
    return [found[name] for name in named]


def triples(completions) -> list[tuple[str, int, str]]:
    return [(c.text, c.num_tokens, c.finish_reason) for c in completions]


@pytest.mark.parametrize("drawn", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize(("architecture", "batch_size"), [("llama", 3), ("opt", 8)])
def test_a_batch_writes_what_each_prompt_gets_alone(architecture, batch_size, drawn):
    """Wrong padding, masks, positions, order or noise would change a completion."""
    model, tokenizer = tiny_model(architecture), byte_level()
    expected = [
        one_at_a_time(model, tokenizer, prompt, 12, 1000, f"number {i}" if drawn else None)
        for i, prompt in enumerate(PROMPTS)
    ]
    if drawn:
        assert expected[0][0] != expected[6][0], "the same prompt under another name"
    else:
        assert {end for _, _, end in expected} == {"eos", "length"}
        assert len({length for _, length, _ in expected}) > 2
    assert triples(complete(model, tokenizer, PROMPTS, batch_size=batch_size, **drawn)) == expected


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_completion_ends_with_the_positions_of_the_model_whatever_shares_its_batch(architecture):
    """OPT has no embedding for a later position and would fail."""
    model, tokenizer = tiny_model(architecture, max_position_embeddings=16), byte_level()
    model.generation_config.eos_token_id = [200]
    prompts = ["a" * length for length in (1, 15, 3, 10, 10, 14, 4, 12)]
    expected = [one_at_a_time(model, tokenizer, prompt, 12, 16) for prompt in prompts]
    assert [length for _, length, end in expected if end == "length"]
    assert triples(complete(model, tokenizer, prompts, batch_size=8)) == expected


def test_sampling_settings_of_the_model_are_ignored_and_kept():
    """A published model often carries a temperature and penalties; the protocol is greedy."""
    model, tokenizer = tiny_model("llama"), byte_level()
    expected = complete(model, tokenizer, PROMPTS)
    own = GenerationConfig(
        do_sample=True,
        temperature=3.0,
        repetition_penalty=4.0,
        min_new_tokens=9,
        max_length=2,
        num_return_sequences=2,
        eos_token_id=model.generation_config.eos_token_id,
    )
    model.generation_config = own
    assert complete(model, tokenizer, PROMPTS) == expected
    assert model.generation_config is own


class Scripted(LlamaForCausalLM):
    """Writes after a prompt what is laid down for the prompt's last token, then the token `rest`.

    `num_steps` counts the tokens that the last batch took.
    """

    scripts: dict[int, list[int]]
    rest = 5
    num_steps = 0

    def forward(self, input_ids=None, past_key_values=None, **inputs):
        """One step of the scripts."""
        if past_key_values.get_seq_length() == 0:
            self.keys, self.num_steps = input_ids[:, -1].tolist(), 0
        output = super().forward(input_ids=input_ids, past_key_values=past_key_values, **inputs)
        output.logits.zero_()
        for row, key in enumerate(self.keys):
            script = self.scripts[key]
            token = script[self.num_steps] if self.num_steps < len(script) else self.rest
            output.logits[row, -1, token] = 1.0
        self.num_steps += 1
        return output


def scripted(tokenizer, continuations: dict[str, list[int]]) -> Scripted:
    model = Scripted(one_layer(len(tokenizer))).eval()
    model.generation_config.eos_token_id = None
    model.scripts = {
        encode_prompt(prompt, tokenizer)[-1]: ids for prompt, ids in continuations.items()
    }
    assert len(model.scripts) == len(continuations), "prompts end in the same token"
    return model


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


SCRIPT_PROMPTS = ["Question: x?y", "b", "Hello 7"]


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_completion_is_the_text_before_the_first_stop_string(tokenizer, data):
    """Each row stops at once, neither a token too early nor one too late, and cuts exactly."""
    texts = data.draw(st.lists(st.text("ab é€\n: 4", max_size=12), min_size=3, max_size=3))
    stops = data.draw(st.lists(st.text("ab é\n: 4", min_size=1, max_size=4), max_size=2))
    _check_stops(tokenizer, texts, stops)


def test_a_stop_string_may_follow_a_character_of_several_tokens(tokenizer):
    _check_stops(tokenizer, ["", "", "é\n4"], ["\n"])
    _check_stops(tokenizer, ["a€\nb", "€é\n\n", "€€:€"], ["\n", ":"])


def _check_stops(tokenizer, texts: list[str], stops: list[str]) -> None:
    scripts = [ids_of(tokenizer, text) for text in texts]
    model = scripted(tokenizer, dict(zip(SCRIPT_PROMPTS, scripts, strict=True)))
    limit = max(map(len, scripts)) or 1
    found = complete(model, tokenizer, SCRIPT_PROMPTS, max_new_tokens=limit, stop=stops)
    for prompt, script, completion in zip(SCRIPT_PROMPTS, scripts, found, strict=True):
        prompt_ids = encode_prompt(prompt, tokenizer)
        written = (script + [model.rest] * limit)[:limit]

        def text_after(num_tokens, prompt_ids=prompt_ids, written=written):
            whole = tokenizer.decode([*prompt_ids, *written[:num_tokens]], skip_special_tokens=True)
            return whole.removeprefix(tokenizer.decode(prompt_ids, skip_special_tokens=True))

        lengths = range(1, limit + 1)
        hits = [n for n in lengths if any(stop in text_after(n) for stop in stops)]
        assert completion.num_tokens == (hits[0] if hits else limit)
        assert completion.finish_reason == ("stop" if hits else "length")
        whole = text_after(completion.num_tokens)
        cut = min((whole.index(stop) for stop in stops if stop in whole), default=len(whole))
        assert completion.text == whole[:cut]
    assert model.num_steps == max(completion.num_tokens for completion in found)


@pytest.mark.parametrize(
    ("stops", "text", "num_written"), [([" 4"], "", 2), (["4", " 4"], "", 2), (["44"], " ", 3)]
)
def test_stop_strings_at_the_start_and_within_each_other(tokenizer, stops, text, num_written):
    """The first one in the text counts, not the first in the list; a leading space is seen too."""
    written = [ids_of(tokenizer, piece)[-1] for piece in (" ", "a4", "a4", "ab", "ab")]
    model = scripted(tokenizer, {"b": written})
    (completion,) = complete(model, tokenizer, ["b"], stop=stops)
    assert (completion.text, completion.num_tokens) == (text, num_written)


def test_leading_spaces_survive_a_decoder_that_strips_them(sentencepiece_tokenizer):
    """Indentation is part of a program."""
    tokenizer = sentencepiece_tokenizer
    model = scripted(tokenizer, {"b": ids_of(tokenizer, "   ab")})
    (completion,) = complete(model, tokenizer, ["b"], max_new_tokens=6, stop=["ab"])
    assert completion.text == "   "
    assert completion.finish_reason == "stop"


def test_a_stop_string_may_be_a_special_token_or_end_within_a_token():
    tokenizer = byte_level("Q: more")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    special, wide = tokenizer.convert_tokens_to_ids(["<|im_end|>", "Q: more"])
    scripts = {
        "a": [*ids_of(tokenizer, "12"), special, *ids_of(tokenizer, "3")],
        "b": [*ids_of(tokenizer, "7"), wide, *ids_of(tokenizer, "3")],
        "c": [*ids_of(tokenizer, "89"), tokenizer.eos_token_id, *ids_of(tokenizer, "3")],
        "d": ids_of(tokenizer, "5<|im_en 6"),
    }
    model, stops = scripted(tokenizer, scripts), ["Q:", "<|im_end|>"]
    found = complete(model, tokenizer, list(scripts), stop=stops)
    *ended, last = triples(found)
    assert ended == [("12", 3, "stop"), ("7", 2, "stop"), ("89", 3, "eos")]
    assert (last[0][:9], *last[1:]) == ("5<|im_en ", 12, "length")


def test_prompts_that_the_model_cannot_read_are_refused():
    tokenizer = byte_level("wide")
    model = tiny_model("llama", max_position_embeddings=16)
    with pytest.raises(ValueError, match=r"prompt of number 1 has 16 tokens.*16 positions"):
        complete(model, tokenizer, ["a", "b" * 16])
    with pytest.raises(ValueError, match="token 258 and the model knows 258 tokens"):
        complete(model, tokenizer, ["a wide b"])


def save_base(folder, dtype=torch.float32):
    model = tiny_model("llama").to(dtype)
    model.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return model


def load_model(folder, *, delta_path=None, dtype="auto"):
    return load_weights(open_model(str(folder), delta_path=delta_path, dtype=dtype), CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_is_base_plus_delta_in_the_dtype_of_the_delta(tmp_path, dtype):
    """The files stay fp32: a delta that was trained in bf16 must bring its dtype along."""
    base = save_base(tmp_path / "base").to(getattr(torch, dtype))
    name = "model.layers.1.self_attn.q_proj.weight"
    moved = {name: (torch.tensor([3, 200]), torch.tensor([7.0, -0.1]))}
    delta = save_delta(tmp_path / "delta.safetensors", base, moved)
    expected = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for name, values in delta.values.items():
        expected[name].view(-1)[delta.mask.indices[name].long()] = values
    model = load_model(tmp_path / "base", delta_path=tmp_path / "delta.safetensors")
    assert not model.training
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == expected[name].dtype


def test_without_a_delta_the_dtype_is_that_of_the_files_or_as_told(tmp_path):
    save_base(tmp_path, torch.bfloat16)
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        assert load_model(tmp_path, dtype=dtype).dtype == expected


def test_damaged_weights_are_refused_in_one_sentence(tmp_path):
    """All else that cannot be loaded is told in test_sampling.py and test_classification.py."""
    save_base(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "are damaged (model.safetensors: " in refusal(load_model, tmp_path)


def test_code_that_comes_with_a_model_is_refused_without_a_question(tmp_path, monkeypatch):
    """Where it is not told, transformers asks at the terminal, and runs the code on a yes."""
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(f"asked: {question}"))
    assert "pass --trust_remote_code" in refusal(open_model, str(tmp_path))
