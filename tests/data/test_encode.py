"""Tokens of each kind of answer: their borders, what is cut, and what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from gem_ds.data.encode import (
    LongPromptsError,
    encode_candidates,
    encode_prompt,
    encode_texts,
)
from gem_ds.data.pairs import encode_pairs
from gem_ds.data.tasks import Example, PlainText
from tests.tiny_tasks import KINDS, bert_tokenizer, choice, make_task
from tests.tiny_tokenizers import save_sentencepiece

CORPUS = ["Question: How many clips?\nAnswer: She sold 48 clips.\n#### 72", "xyz xyz xyz"] * 20
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [{"role": "user", "content": "How many?"}]
SYSTEM = [{"role": "system", "content": "s"}]
WIDE = 10_000
HABITS = [(False, False), (True, False), (False, True), (True, True)]  # of adding bos and eos


def sequences(dataset, values=None):
    """Token ids of each sequence, or another value of each token."""
    values = dataset.tokens if values is None else values
    return [ids.tolist() for ids in values.split(dataset.offsets.diff().tolist())]


def encode(example, tokenizer, max_length=WIDE):
    """Token ids of one example, and how many of them are the prompt's."""
    dataset = encode_texts([example], tokenizer, max_length)
    return *sequences(dataset), int(dataset.prompt_lengths)


def byte_level(*, add_bos=False, add_eos=False, **names):
    """A small byte-level BPE tokenizer; `names` replaces its special tokens (None removes one)."""
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "</s>"]
    tokenizer.train_from_iterator(CORPUS, 320, special_tokens=special, show_progress=False)
    if add_bos or add_eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' * add_bos}$A{' </s>' * add_eos}",
            special_tokens=[("<s>", 0), ("</s>", 1)],
        )
    names = {"bos_token": "<s>", "eos_token": "</s>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **names)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Both families, with each habit of adding special tokens."""
    lines = [line for text in CORPUS for line in text.split("\n")]
    folder = save_sentencepiece(tmp_path_factory.mktemp("sentencepiece"), lines, vocab_size=340)
    found = {}
    for bos, eos in HABITS:
        found["byte-level", bos, eos] = byte_level(add_bos=bos, add_eos=eos)
        found["sentencepiece", bos, eos] = LlamaTokenizer.from_pretrained(
            folder, add_bos_token=bos, add_eos_token=eos
        )
    return found


@pytest.mark.parametrize("family", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize(("add_bos", "add_eos"), HABITS)
def test_encode_is_what_the_tokenizer_does_with_the_whole_text(
    tokenizers, family, add_bos, add_eos
):
    """An eos after the prompt would teach the model to answer an ended text."""
    tokenizer = tokenizers[family, add_bos, add_eos]
    example = Example(prompt="Question: How many clips?\nAnswer:", target=" She sold\n#### 72")
    input_ids, prompt_length = encode(example, tokenizer)

    whole = tokenizer(example.prompt + example.target)["input_ids"]
    assert input_ids == (whole if add_eos else [*whole, tokenizer.eos_token_id])
    prompt = tokenizer(example.prompt)["input_ids"]
    assert input_ids[:prompt_length] == (prompt[:-1] if add_eos else prompt)
    assert encode_prompt(example.prompt, tokenizer) == input_ids[:prompt_length]
    assert (input_ids[0] == tokenizer.bos_token_id) == add_bos
    text = tokenizer.decode(input_ids, skip_special_tokens=True)
    assert text.removeprefix(" ") == example.prompt + example.target


def test_a_token_across_the_border_is_not_used():
    """Generation starts from the prompt's own tokens, so training must too."""
    tokenizer = byte_level()
    assert len(tokenizer("xyz")["input_ids"]) == 1
    input_ids, prompt_length = encode(Example(prompt="x", target="yz xyz"), tokenizer)
    assert input_ids[:prompt_length] == tokenizer("x")["input_ids"]
    assert input_ids[prompt_length:-1] == tokenizer("yz xyz")["input_ids"]


@settings(max_examples=30, deadline=None)
@given(prompt=st.text(max_size=12), target=st.text(max_size=12))
def test_any_text_survives_in_two_parts(tokenizers, prompt, target):
    """Byte-level tokens decode to their text exactly, on both sides of the border."""
    tokenizer = tokenizers["byte-level", True, False]
    input_ids, prompt_length = encode(Example(prompt=prompt, target=target), tokenizer)
    assert input_ids[0] == tokenizer.bos_token_id
    assert input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(input_ids[1:prompt_length]) == prompt
    assert tokenizer.decode(input_ids[prompt_length:-1]) == target


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("Answer: ", "She sold"),
        ("Quest", "ion: How"),
        ("She sold 4", "8 clips"),
        ("Answer:\n", "\n She"),
        ("Answer: ", " She"),
        ("", "She"),
    ],
)
@pytest.mark.parametrize("family", ["byte-level", "sentencepiece"])
def test_both_parts_together_are_the_text_given(tokenizers, family, prompt, target):
    """Alone, a SentencePiece tokenizer would begin the target with a space that nobody wrote."""
    tokenizer = tokenizers[family, True, False]
    input_ids, prompt_length = encode(Example(prompt=prompt, target=target), tokenizer)
    assert input_ids[:prompt_length] == encode_prompt(prompt, tokenizer)
    read, whole = (
        tokenizer.decode(ids, skip_special_tokens=True)
        for ids in (input_ids[:prompt_length], input_ids)
    )
    assert (read.strip(), whole.removeprefix(" ")) == (prompt.strip(), prompt + target)
    assert whole.removeprefix(read) == target or not prompt


@settings(max_examples=60, deadline=None)
@given(prompt=st.text("She sold 48\n:é", max_size=9), target=st.text("She sold 48\n:é", max_size=9))
def test_no_border_of_a_sentencepiece_text_gains_a_space(tokenizers, prompt, target):
    tokenizer = tokenizers["sentencepiece", True, False]
    input_ids, _ = encode(Example(prompt=f"x{prompt}", target=target), tokenizer)
    assert tokenizer.decode(input_ids, skip_special_tokens=True) == f"x{prompt}{target}"


@pytest.mark.parametrize("family", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("bos", ["<s>", ""])
def test_special_tokens_that_the_text_has_are_not_added_again(tokenizers, family, bos):
    """Prompts that another program rendered begin with the bos, and end with the eos."""
    tokenizer = tokenizers[family, True, False]
    example = Example(prompt=f"{bos}[INST] How many? [/INST]", target=" 48</s>")
    input_ids, prompt_length = encode(example, tokenizer)
    assert input_ids.count(tokenizer.bos_token_id) == input_ids.count(tokenizer.eos_token_id) == 1
    assert (input_ids[0], input_ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert encode_prompt(example.prompt, tokenizer) == input_ids[:prompt_length]


def test_of_a_plain_text_all_is_learnt_that_something_precedes():
    for tokenizer in (byte_level(bos_token=None), byte_level(), byte_level(add_bos=True)):
        ids, prompt_length = encode(PlainText(target="xyz She"), tokenizer)
        own = tokenizer("xyz She", add_special_tokens=False)["input_ids"]
        has_bos = tokenizer.bos_token_id is not None
        assert (ids, prompt_length) == ([0] * has_bos + [*own, 1], 1)
    for target in ("", "x"):
        ids, prompt_length = encode(PlainText(target=target), byte_level())
        assert (ids[0], ids[-1], prompt_length) == (0, 1, 1)


def test_a_long_prompt_may_lose_its_start():
    """But not its bos, nor more than half of the room; the answer is cut only beyond that."""
    tokenizer = byte_level(add_bos=True)
    example = Example(prompt="abcdefgh", target="ijkl")
    full, prompt_length = encode(example, tokenizer)
    answer = full[prompt_length:]
    for max_length in range(2, len(full) + 1):
        data = encode_texts([example], tokenizer, max_length, truncate_left=True)
        (ids,), length = sequences(data), int(data.prompt_lengths)
        room = max(max_length - len(answer), max_length // 2)
        assert (length, len(ids)) == (min(room, prompt_length), max_length)
        assert ids[length:] == answer[: max_length - length]
        assert ids[:length] == [0, *full[prompt_length - length + 1 : prompt_length]]
        assert data.num_truncated == (max_length < len(full))
    with pytest.raises(LongPromptsError):
        encode_texts([example], tokenizer, 1, truncate_left=True)


def test_long_prompts_are_named_together_by_where_they_stand():
    fine, long, longer = (
        Example(prompt="ab" * n, target="c", place=f"a.jsonl, line {n}") for n in (1, 3, 9)
    )
    with pytest.raises(LongPromptsError, match=r"^a.jsonl, line 3 has a prompt of 6 .* 2 of 3 exa"):
        encode_texts([fine, long, longer], byte_level(), 6)
    with pytest.raises(LongPromptsError) as caught:
        encode_candidates([SHORT, replace(SHORT, prompt="ab" * 4)], byte_level(), 6)
    assert (caught.value.rows, caught.value.longest) == ([1], 8)


def test_an_empty_prompt_is_the_bos_token():
    example, tokenizer = Example(prompt="", target="xyz"), byte_level()
    assert encode(example, tokenizer) == ([0, *tokenizer("xyz")["input_ids"], 1], 1)
    assert encode(example, byte_level(add_bos=True, add_eos=True))[1] == 1
    assert encode_prompt("", tokenizer) == [0]


@pytest.mark.parametrize("family", ["byte-level", "sentencepiece"])
def test_chat_messages_go_through_the_template(tokenizers, family, monkeypatch):
    """The template writes its own bos: a second one from the tokenizer would be wrong."""
    tokenizer = tokenizers[family, True, True]
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    input_ids, prompt_length = encode(Example(prompt=CHAT, target=" 72"), tokenizer)
    ids = tokenizer("<s>user: How many?\nassistant:", add_special_tokens=False)["input_ids"]
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
    assert input_ids[:prompt_length] == ids == rendered["input_ids"]
    assert input_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(input_ids[prompt_length:-1]).strip() == "72"
    assert encode_prompt(CHAT, tokenizer) == ids


def test_a_long_answer_is_cut():
    tokenizer = byte_level()
    example, short = Example(prompt="abcd", target="efgh"), Example(prompt="a", target="b")
    full, prompt_length = encode(example, tokenizer)
    for max_length in range(prompt_length + 1, len(full) + 2):
        assert encode(example, tokenizer, max_length) == (full[:max_length], prompt_length)
    cut = encode_texts([example, short, example], tokenizer, len(full) - 1)
    assert cut.truncated.tolist() == [True, False, True]
    assert cut.num_truncated == 2
    assert encode_texts([example], tokenizer, len(full)).num_truncated == 0


SHORT = choice("ab", ("c", "d"), 0, (("red " * 10, "blue"),))


@pytest.mark.parametrize(
    ("encode_all", "names", "change", "max_length", "message"),
    [
        (encode_texts, {"eos_token": None}, {}, WIDE, "no end-of-sequence token"),
        (encode_texts, {"bos_token": None}, {"prompt": ""}, WIDE, "Example 2 has an empty prompt "),
        (encode_texts, {}, {"prompt": "abcd"}, 4, "Example 2 has a prompt of 4 .* of 4: raise"),
        (encode_texts, {}, {"prompt": CHAT}, WIDE, "Example 2 holds chat .* no chat template"),
        (
            encode_texts,
            {"chat_template": TEMPLATE},
            {"prompt": SYSTEM},
            WIDE,
            r"2 \(no system role",
        ),
        (encode_candidates, {}, {"prompt": "a" * 9}, 4, "Example 2 has a prompt of 9 tokens"),
        (encode_candidates, {}, {"candidates": ("c", "")}, 4, "Example 2 has the candidate '', w"),
        (encode_pairs, None, {}, 3, r"3 special tokens .* raise --max_length"),
    ],
)
def test_what_cannot_be_encoded_is_refused(encode_all, names, change, max_length, message):
    tokenizer = bert_tokenizer() if names is None else byte_level(**names)
    with pytest.raises(ValueError, match=message):
        encode_all([SHORT, replace(SHORT, **change)], tokenizer, max_length)


def test_a_dataset_is_its_examples_encoded_one_by_one(tokenizers):
    tokenizer = tokenizers["sentencepiece", True, False]
    examples = [Example(prompt=f"How many {i}?", target=f" {i}" * (i % 5)) for i in range(1100)]
    dataset = encode_texts(examples, tokenizer, 12)
    indices = [*range(0, 990, 45), *range(990, 1100)]  # across chunks
    single = [encode(examples[i], tokenizer, 12) for i in indices]
    texts = sequences(dataset)
    assert [(texts[i], int(dataset.prompt_lengths[i])) for i in indices] == single
    assert dataset.num_items(indices) == sum(len(ids) - length for ids, length in single)
    assert dataset.tokens.dtype == dataset.prompt_lengths.dtype == torch.int32
    long = Example(prompt="a" * 99, target="b")
    with pytest.raises(ValueError, match="Example 1101 has a prompt of 101 tokens"):
        encode_texts([*examples, long], tokenizer, 12)


def test_candidates_are_encoded_without_eos():
    """A candidate's likelihood would count the end of the text, which is no part of it."""
    tokenizer, examples = byte_level(add_bos=True), make_task("choices").train
    dataset = encode_candidates(examples, tokenizer, WIDE)
    texts = [f"{e.prompt}{candidate}" for e in examples for candidate in e.candidates]
    assert sequences(dataset) == [tokenizer(text)["input_ids"] for text in texts]
    assert dataset.groups.diff().tolist() == [len(e.candidates) for e in examples]
    assert {len(e.candidates) for e in examples} == {2, 3}
    assert dataset.answers.tolist() == [e.answer for e in examples]
    assert len(dataset) == len(examples) == dataset.num_items(range(len(dataset)))


def test_candidates_that_are_too_long_are_counted_by_example():
    long = replace(SHORT, candidates=("cdef", "ghij"))
    dataset = encode_candidates([SHORT, long, long], byte_level(), 4)
    assert (dataset.num_truncated, dataset.longest) == (2, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_encoded_as_the_tokenizer_does(kind):
    examples, tokenizer = make_task(kind).train, bert_tokenizer()
    dataset = encode_pairs(examples, tokenizer, 40)
    rows = [tokenizer(*pair) for example in examples for pair in example.pairs]
    assert sequences(dataset) == [row["input_ids"] for row in rows]
    assert sequences(dataset, dataset.types) == [row["token_type_ids"] for row in rows]
    assert dataset.num_items(range(len(dataset))) == len(examples) == len(dataset)
    assert dataset.num_truncated == 0
    assert dataset.groups.diff().tolist() == [len(example.pairs) for example in examples]
    values = [e.value if kind == "number" else e.answer for e in examples]
    assert dataset.answers.tolist() == pytest.approx(values)


def test_the_longer_text_of_a_pair_is_cut_and_types_are_of_tokenizers_that_have_them():
    tokenizer = bert_tokenizer()
    dataset = encode_pairs([SHORT, replace(SHORT, pairs=(("red", "blue"),))], tokenizer, 8)
    assert sequences(dataset)[0] == tokenizer("red " * 4, "blue")["input_ids"]
    assert (dataset.num_truncated, dataset.longest) == (1, 8)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    dataset = encode_pairs([replace(SHORT, pairs=(("red blue", None),))], tokenizer, 40)
    assert sequences(dataset) == [tokenizer("red blue")["input_ids"]]
    assert "token_type_ids" not in dataset.collate([0], 0)


@pytest.mark.parametrize("encode_all", [encode_texts, encode_candidates, encode_pairs])
def test_a_selection_is_its_examples_encoded_alone(encode_all):
    """As where a part of the examples is trained on."""
    tokenizer = bert_tokenizer() if encode_all == encode_pairs else byte_level()
    examples = make_task("choices").train
    dataset = encode_all(examples, tokenizer, 60)
    selected = dataset.select([3, 0, 3])
    same = encode_all([examples[i] for i in (3, 0, 3)], tokenizer, 60)
    assert selected.fingerprint() == same.fingerprint() != dataset.select([0, 3, 3]).fingerprint()
    assert selected.truncated.tolist() == same.truncated.tolist()
    assert len(dataset.select([])) == len(encode_all([], tokenizer, 60)) == 0
