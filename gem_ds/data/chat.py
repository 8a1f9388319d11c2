"""Chat messages -> text: what the tokenizer's template makes of them, and which of it is learnt.

    user: Hi    assistant: Hello   ->   "<|user|>Hi<|end|><|assistant|>"    "Hello<|end|>"
                                        read                                learnt

An answer is what the rendered conversation has with it beyond the same without it, but for the
words that ask for it (`add_generation_prompt`): the template's end of the turn, tool calls and
reasoning are thereby learnt as the template writes them. Where a template marks its answers
(`{% generation %}`), what it marks is learnt instead. A template that writes earlier answers
otherwise once others follow (without their reasoning) gives each answer a text of its own.

Templates differ in what they read of a tool call (arguments as an object or as JSON text, no
content as "" or null): the first form is taken in which the template writes the call.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any, Self, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from gem_ds.data.tasks import ChatExample, Example, Message

Pieces = list[str]
"""A text in pieces that are in turn read and learnt: the first is read, the last is learnt."""

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: Names of one key, to transformers.
_REASONING = ("reasoning_content", "reasoning", "thinking")
_PROBE = "ANSWER"
#: What templates raise over messages that they do not expect.
_REFUSALS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)


def render_prompt(messages: list[Message], tokenizer: PreTrainedTokenizerBase, place: str) -> str:
    """The text from which an answer is generated; errors call the messages those of `place`."""
    return _Chat.of(messages, None, tokenizer, place).text(len(messages), asks=True)


def render_answers(
    example: Example, tokenizer: PreTrainedTokenizerBase, place: str
) -> list[Pieces]:
    """What is read and learnt of a conversation: one text, or one for each answer.

    Raises:
        ValueError: There is no template, it refuses the messages, or writes nothing of an answer.
    """
    chat = _Chat.of_example(example, tokenizer, place)
    marks = chat.marks(len(example.prompt))
    if marks:
        return [_cut(chat.text(), marks)]
    texts = [
        (chat.text(i, asks=True), chat.text(i + 1))
        for i in range(len(example.prompt), len(chat.messages))
        if chat.messages[i]["role"] == "assistant"
    ]
    if any(before.startswith(after) for before, after in texts):
        raise ValueError(f"The chat template writes nothing of an answer of {place}: use another.")
    whole = texts[-1][1]
    if all(whole.startswith(text) for pair in texts for text in pair):
        return [_cut(whole, [(len(before), len(after)) for before, after in texts])]
    return [_apart(before, after) for before, after in texts]


def end_of_turn(example: Example, tokenizer: PreTrainedTokenizerBase, place: str) -> str:
    """What the template writes behind an answer, white space included."""
    answer = ChatExample(prompt=example.prompt, turns=[{"role": "assistant", "content": _PROBE}])
    _, found, end = _Chat.of_example(answer, tokenizer, place).text().rpartition(_PROBE)
    return end if found else ""


def notes(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What the template leaves out of conversations that it renders, a sentence for each kind."""
    chats = [e for e in examples if isinstance(e, ChatExample)]
    if not chats:
        return
    tools = next((chat.tools for chat in chats if chat.tools), None)
    template = tokenizer.get_chat_template(tools=tools)
    keys = {key for chat in chats for m in (*chat.prompt, *chat.turns) for key in m}
    keys = (keys - {"role", "content"}) | ({"tools"} if tools else set())
    if unused := [key for key in sorted(keys) if not _is_used(key, template)]:
        yield f"The chat template does not use {', '.join(map(repr, unused))}"
    for chat in chats:
        reasoning = next(filter(None, (chat.turns[-1].get(key) for key in _REASONING)), "")
        if not isinstance(reasoning, str) or not reasoning.strip():
            continue
        learnt = "".join("".join(p[1::2]) for p in render_answers(chat, tokenizer, chat.place))
        if reasoning.strip() not in learnt:
            yield "The chat template leaves out the reasoning of answers, so it is not learnt"
        break
    first = _Chat.of_example(chats[0], tokenizer, chats[0].place)
    asked, whole = first.text(len(chats[0].prompt), asks=True), first.text()
    rest = asked[_num_common(asked, whole) :]
    if rest and not _MARK.search(template) and rest not in whole:
        yield (
            f"The chat template asks for an answer with {rest!r}, which it does not write before "
            "the answers in the data: they are learnt without it"
        )


def _is_used(key: str, template: str) -> bool:
    names = _REASONING if key in _REASONING else (key,)
    return any(re.search(rf"\b{re.escape(name)}\b", template) for name in names)


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> Pieces:
    """The text up to the last span's end, cut where spans begin and end."""
    ends = [0, *(end for span in spans for end in span)]
    return [text[start:end] for start, end in pairwise(ends)]


def _apart(asked: str, answered: str) -> Pieces:
    """What asks for an answer, and the answer, where the first need not begin the whole.

    If the words that ask stand further on in it, the answer is what follows them.
    """
    common = _num_common(asked, answered)
    words = asked[common:]
    if words and words in answered[common:]:
        return [asked, answered[common:].partition(words)[2]]
    return [answered[:common], answered[common:]]


def _num_common(first: str, second: str) -> int:
    """Characters at the start of two texts that are the same."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


@dataclass(frozen=True, kw_only=True)
class _Chat:
    """Messages in a form that the template takes."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    tokenizer: PreTrainedTokenizerBase
    place: str

    @classmethod
    def of(
        cls, messages: list[Message], tools: Any, tokenizer: PreTrainedTokenizerBase, place: str
    ) -> Self:
        """The first of the forms in which the template writes all tool calls."""
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{place} holds chat messages but the tokenizer has no chat template: use a model "
                "that has one, or pass --prompt_field and --target_field."
            )
        chat = cls(messages=messages, tools=tools, tokenizer=tokenizer, place=place)
        if not any(message.get("tool_calls") for message in messages):
            return chat
        refusal = None
        for is_text, empty in product((False, True), ("", None)):
            form = replace(chat, messages=[_written(m, is_text, empty) for m in messages])
            try:
                if all(form.writes_calls(i) for i in range(len(messages))):
                    return form
            except ValueError as error:
                refusal = error
        raise refusal or ValueError(
            f"The tokenizer's chat template leaves out the tool calls of {place}: use a model "
            "whose template writes them."
        )

    @classmethod
    def of_example(cls, example: Example, tokenizer: PreTrainedTokenizerBase, place: str) -> Self:
        """A whole conversation."""
        assert not isinstance(example.prompt, str)
        if isinstance(example, ChatExample):
            return cls.of([*example.prompt, *example.turns], example.tools, tokenizer, place)
        answer = {"role": "assistant", "content": example.target}
        return cls.of([*example.prompt, answer], None, tokenizer, place)

    def writes_calls(self, i: int) -> bool:
        """Whether message i's tool calls, if it has any, come into its text by their names."""
        names = [call["function"]["name"] for call in self.messages[i].get("tool_calls") or ()]
        if not names:
            return True
        before, text = self.text(i) if i else "", self.text(i + 1)
        own = text[_num_common(before, text) :]
        return all(name in own for name in names)

    def text(self, count: int | None = None, *, asks: bool = False) -> str:
        """The first `count` messages as text; with `asks` and what asks for an answer."""
        return self._render(count, add_generation_prompt=asks)[0]

    def marks(self, first: int) -> list[tuple[int, int]]:
        """Where the template marks answers from message `first` on, if it marks any."""
        template = self.tokenizer.get_chat_template(tools=self.tools)
        if not _MARK.search(template):
            return []
        start = _num_common(self.text(first, asks=True), self.text())
        _, spans = self._render(None, return_assistant_tokens_mask=True)
        return [(a, b) for a, b in spans if a < b and b > start]

    def _render(self, count: int | None, **options: bool) -> tuple[str, list[tuple[int, int]]]:
        template = self.tokenizer.get_chat_template(tools=self.tools)
        named: dict[str, Any] = {**self.tokenizer.special_tokens_map, **options}
        messages = self.messages[:count]
        render = cast(Any, render_jinja_template)  # it does not return the one text that it says
        try:
            texts, marks = render([messages], tools=self.tools, chat_template=template, **named)
        except _REFUSALS as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"The tokenizer's chat template refuses the messages of {self.place} ({reason}): "
                f"change their roles or their order."
            ) from error
        return texts[0], marks[0] if marks else []


def _written(message: Message, is_text: bool, empty: str | None) -> Message:
    """A message with tool calls whose arguments are JSON text, and no content as `empty`."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        if is_text and not isinstance(function.get("arguments", ""), str):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": function})
    return {**message, "content": message.get("content") or empty, "tool_calls": calls}
