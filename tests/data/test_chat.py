"""What is read and learnt of conversations, beside what a template renders of them as a whole.

The templates are those of chat.toml.
"""

import tomllib
from pathlib import Path

import pytest
import torch

from gem_ds.data import chat
from gem_ds.data.dataset import IGNORED_LABEL
from gem_ds.data.encode import encode_prompt, encode_texts
from gem_ds.data.packing import pack
from gem_ds.data.tasks import ChatExample, Example
from tests.tiny_tokenizers import byte_level

#: By the family that writes so; what each of them does is told there.
CHATML, THINKING, LLAMA, DEEPSEEK, MARKED, BARE = tomllib.loads(
    Path(__file__).with_name("chat.toml").read_text(encoding="utf-8")
).values()
#: As QwQ's and the distilled R1's: it asks with a thought begun and drops thoughts.
OPENED = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
CALLING = [assistant(content, tool_calls=[CALL]) for content in ("", None)]
ASKED = [user("Weather in Paris?")]
RESULT = {"role": "tool", "content": "18 C"}
SCHEMA = [{"type": "function", "function": {"name": "weather", "description": "w"}}]
WRITTEN = '<call>weather {"city": "Paris"}</call>'
TURNS = [assistant("Hello"), user("Who?"), assistant("Me")]


def tokenizer_of(template):
    return byte_level("<|im_start|>", "<|im_end|>", chat_template=template)


def learnt(example, template):
    """Of each sequence the text that is read and the learnt parts, as the labels say it."""
    tokenizer = tokenizer_of(template)
    dataset = encode_texts([example], tokenizer, 10_000)
    told = []
    for i in range(len(dataset)):
        batch = dataset.collate([i], 0)
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        is_learnt = labels != IGNORED_LABEL
        assert bool((labels[is_learnt] == ids[is_learnt]).all())
        assert int(is_learnt.sum()) == dataset.num_items([i])
        starts = [n for n in range(len(ids)) if is_learnt[n] and not is_learnt[n - 1]]
        parts = []
        for start in starts:
            end = next((n for n in range(start, len(ids)) if not is_learnt[n]), len(ids))
            parts.append(tokenizer.decode(ids[start:end]))
        told.append((tokenizer.decode(ids), parts))
    return told


def rendered(template, messages, **options):
    """What transformers makes of messages."""
    return tokenizer_of(template).apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize(
    ("template", "turns", "answers"),
    [
        (CHATML, [assistant("Hello")], ["Hello<|im_end|>\n"]),
        (CHATML, TURNS, ["Hello<|im_end|>\n", "Me<|im_end|>\n"]),
        (LLAMA, TURNS, [" Hello </s>", " Me </s>"]),
        (CHATML, [CALLING[0]], [f"{WRITTEN}<|im_end|>\n"]),
        (
            CHATML,
            [CALLING[0], RESULT, assistant("It is 18 C.")],
            [f"{WRITTEN}<|im_end|>\n", "It is 18 C.<|im_end|>\n"],
        ),
        (
            THINKING,
            [assistant("4", reasoning_content="2 and 2")],
            ["<think>2 and 2</think>4<|im_end|>\n"],
        ),
        (MARKED, TURNS, ["Hello<|im_end|>", "Me<|im_end|>"]),
    ],
)
def test_what_is_learnt_is_what_the_template_writes_of_the_answers(template, turns, answers):
    """And all that is read and learnt is the conversation as transformers renders it."""
    messages = [*ASKED, *turns]
    (text, parts), *others = learnt(ChatExample(prompt=ASKED, turns=turns, tools=SCHEMA), template)
    assert (parts, others) == (answers, [])
    whole = rendered(template, messages, tools=SCHEMA)
    assert whole.startswith(text)
    assert whole[len(text) :].strip() == ""
    ids = encode_prompt(ASKED, tokenizer_of(template))
    assert tokenizer_of(template).decode(ids) == rendered(
        template, ASKED, add_generation_prompt=True
    )


def test_marked_answers_are_those_of_transformers():
    tokenizer = tokenizer_of(MARKED)
    dataset = encode_texts([ChatExample(prompt=ASKED, turns=TURNS)], tokenizer, 10_000)
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    expected = tokenizer.apply_chat_template([*ASKED, *TURNS], **options)
    labels = dataset.collate([0], 0)["labels"][0]
    mask = (labels != IGNORED_LABEL).int().tolist()
    assert mask == expected["assistant_masks"][: len(mask)]
    assert sum(mask) == sum(expected["assistant_masks"])


def test_only_the_turns_are_learnt_and_marks_do_not_change_that():
    last = ChatExample(prompt=[*ASKED, *TURNS[:2]], turns=TURNS[2:])
    for template, end in ((CHATML, "\n"), (MARKED, "")):
        assert [parts for _, parts in learnt(last, template)] == [[f"Me<|im_end|>{end}"]]


@pytest.mark.parametrize("call", CALLING)
@pytest.mark.parametrize(
    ("template", "text"),
    [(CHATML, f"{WRITTEN}<|im_end|>\n"), (DEEPSEEK, f"{WRITTEN}</s>")],
)
def test_a_call_is_written_in_the_form_that_the_template_takes(template, text, call):
    """Content "" or null, arguments as an object or as text: none may cost the call."""
    ((_, parts),) = learnt(ChatExample(prompt=ASKED, turns=[call]), template)
    assert parts == [text]


def test_calls_that_a_template_leaves_out_are_refused():
    example = ChatExample(prompt=ASKED, turns=[CALLING[0]], tools=SCHEMA, place="a.jsonl, line 3")
    with pytest.raises(ValueError, match=r"leaves out the tool calls of a.jsonl, line 3: use a mo"):
        encode_texts([example], tokenizer_of(BARE), 10_000)


def test_answers_that_later_ones_change_have_a_text_each():
    """In one text the first answer would be learnt without its reasoning, unlike when asked for."""
    turns = [assistant("4", reasoning_content="a"), user("And?"), assistant("5", thinking="b")]
    example = ChatExample(prompt=ASKED, turns=turns)
    first, second = learnt(example, THINKING)
    assert first == (rendered(THINKING, [*ASKED, turns[0]]), ["<think>a</think>4<|im_end|>\n"])
    assert second == (rendered(THINKING, [*ASKED, *turns]), ["<think>b</think>5<|im_end|>\n"])


def test_an_eos_ends_what_the_template_does_not():
    ((text, parts),) = learnt(ChatExample(prompt=ASKED, turns=[assistant("Hot")]), BARE)
    assert (text, parts) == ("<s>user: Weather in Paris?\nassistant: Hot\n</s>", [" Hot\n</s>"])
    ((_, parts),) = learnt(Example(prompt=ASKED, target="Hot"), CHATML)
    assert parts == ["Hot<|im_end|>\n"]


def test_what_the_template_leaves_out_is_told():
    """Once for each kind, whatever the number of conversations."""

    def notes(template, *turns, **more):
        examples = [ChatExample(prompt=ASKED, turns=list(turns), **more)] * 3
        return list(chat.notes(examples, tokenizer_of(template)))

    assert notes(CHATML, assistant("a"), tools=SCHEMA) == notes(LLAMA, assistant("a")) == []
    (note,) = notes(LLAMA, assistant("a", id=3, weight=1), tools=SCHEMA)
    assert note == "The chat template does not use 'id', 'tools', 'weight'"
    (note,) = notes(OPENED, assistant("a"))
    assert "asks for an answer with '<think>\\n', which it does not write" in note
    assert notes(THINKING, assistant("a", reasoning="b")) == []
    notes_of_lost = notes(CHATML, assistant("a", reasoning="b"))
    assert any("'reasoning'" in note for note in notes_of_lost)
    assert any("leaves out the reasoning" in note for note in notes_of_lost)
    assert list(chat.notes([Example(prompt="p", target="t")], byte_level())) == []


def test_a_conversation_is_cut_and_packed_with_what_is_learnt():
    tokenizer = tokenizer_of(CHATML)
    examples = [ChatExample(prompt=ASKED, turns=TURNS), Example(prompt=ASKED, target="Hot")]
    dataset = encode_texts(examples, tokenizer, 10_000)
    counts = [dataset.num_items([i]) for i in (0, 1)]
    packed = pack(dataset, dataset.longest * 2)
    assert len(packed) == 1
    assert packed.num_items([0]) == sum(counts)
    batch = packed.collate([0], 0)
    assert int((batch["labels"] != IGNORED_LABEL).sum()) == sum(counts)
    ends = len(tokenizer("Me<|im_end|>\n")["input_ids"])
    shorter = encode_texts(examples[:1], tokenizer, dataset.longest - ends)
    assert shorter.num_items([0]) == counts[0] - ends
    assert shorter.num_truncated == 1
    assert torch.equal(shorter.tokens, dataset.tokens[: dataset.longest - ends])
    same = encode_texts(
        [ChatExample(prompt=[*ASKED, *TURNS[:2]], turns=TURNS[2:])], tokenizer, 10_000
    )
    assert same.fingerprint() != encode_texts(examples[:1], tokenizer, 10_000).fingerprint()
