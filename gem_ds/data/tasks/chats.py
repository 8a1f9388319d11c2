"""Conversations in the user's data -> `ChatExample`: OpenAI's messages, ShareGPT's, TRL's pairs.

    {"role": "user", "content": "Hi"}       {"from": "human", "value": "Hi"}

Content is text, or parts that are text; beside tool calls it may be null. Whatever else a message
holds goes to the chat template. An answer that nothing precedes is read and not learnt, and what
follows the last answer is left out.
"""

import json
from collections import Counter
from typing import Any

from gem_ds.data.tasks import ChatExample, Example, Message, Source
from gem_ds.data.tasks.lines import Line, json_type

Told = Counter[str]
"""What the log says of how the data were read, and of how many rows."""

#: Names that other programs give the roles.
ROLES = {
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
_OWN = ("role", "content", "from", "value")


def of_messages(line: Line, source: Source, told: Told) -> Example:
    """A row with `messages` (or, with ShareGPT's names, `conversations`) and perhaps `tools`."""
    field = "messages" if "messages" in line.fields else "conversations"
    messages = _messages(line, field, told)
    if isinstance(system := line.fields.get("system"), str) and system and field != "messages":
        messages.insert(0, {"role": "system", "content": system})
    return _conversation(line, messages, 1, source, told)


def of_pair(line: Line, source: Source, told: Told) -> Example:
    """A row with `prompt` and `completion`, both texts or both messages."""
    if not isinstance(line.fields["prompt"], list):
        prompt, target = line.text("prompt"), line.text("completion")
        return Example(prompt=prompt, target=target, place=line.place)
    messages = _messages(line, "prompt", told)
    first = max(1, len(messages))
    return _conversation(line, messages + _messages(line, "completion", told), first, source, told)


def _conversation(
    line: Line, messages: list[Message], first: int, source: Source, told: Told
) -> ChatExample:
    """Messages of which the answers from number `first` on are learnt, or the last of them."""
    answers = [
        i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"
    ]
    if not answers:
        raise line.error(
            "'messages' must end with the assistant message to learn and have at least one message "
            "before it."
        )
    if answers[-1] < len(messages) - 1:
        told["Conversations that end without an answer, cut behind the last one"] += 1
    start = answers[-1] if source.train_on == "last" else answers[0]
    if start < answers[-1]:
        told["Conversations of which several answers are learnt (--train_on all)"] += 1
    return ChatExample(
        prompt=messages[:start],
        turns=messages[start : answers[-1] + 1],
        tools=_tools(line),
        place=line.place,
    )


def _messages(line: Line, field: str, told: Told) -> list[Message]:
    value = line.fields[field]
    if not isinstance(value, list):
        raise line.error(f"the field {field!r} must be a list, not {json_type(value)}.")
    return [_message(line, number, message, told) for number, message in enumerate(value, start=1)]


def _message(line: Line, number: int, value: Any, told: Told) -> Message:
    """One message by the names that templates know, its text checked."""
    where = f"message {number}"
    known = {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else {}
    role = known.get("role", known.get("from"))
    names = [name for name in ("content", "value") if isinstance(value, dict) and name in value]
    calls = known.get("tool_calls")
    if role is None or not (names or calls):
        raise line.error(f"{where} must be an object with 'role' and 'content'.")
    role = line.checked_text(role, f"'role' of {where}")
    content = known.get(names[0]) if names else None
    if role == "function_call":  # ShareGPT's: a call as JSON text
        calls, content = _parsed(line.checked_text(content, f"'value' of {where}")), None
        calls = calls if isinstance(calls, list) else [calls]
        told[f"Messages of the role {role!r}, read as assistant"] += 1
        role = "assistant"
    if role in ROLES:
        told[f"Messages of the role {role!r}, read as {ROLES[role]}"] += 1
    message: Message = {"role": ROLES.get(role, role)}
    if content is not None or not calls:
        message["content"] = _text(line, content, f"{(names or ['content'])[0]!r} of {where}")
    else:
        message["content"] = None
    if calls:
        message["tool_calls"] = _calls(line, calls, where)
    rest = {k: v for k, v in known.items() if k not in (*_OWN, "tool_calls")}
    line.checked_text(json.dumps([rest, calls], ensure_ascii=False), where)
    return message | rest


def _text(line: Line, content: Any, name: str) -> str:
    """A content that is text, or parts that are all text."""
    if not isinstance(content, list):
        return line.checked_text(content, name)
    parts = []
    for part in content:
        if not (isinstance(part, dict) and part.get("type", "text") == "text" and "text" in part):
            kind = part.get("type") if isinstance(part, dict) else json_type(part)
            raise line.error(f"{name} has a part that is no text ({kind}): only text is learnt.")
        parts.append(line.checked_text(part["text"], name))
    return "".join(parts)


def _calls(line: Line, calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their function's name, and its arguments as an object where they are one."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise line.error(f"{where} has a tool call without the name of its function.")
        arguments = function.get("arguments", {})
        parsed = _parsed(arguments) if isinstance(arguments, str) else arguments
        written = {"name": function["name"], "arguments": parsed}
        more = {k: v for k, v in call.items() if k not in ("function", "name", "arguments")}
        found.append({"type": "function", **more, "function": written})
    return found


def _tools(line: Line) -> list[dict[str, Any]] | None:
    """The tools that a row offers, as objects or as JSON text of them."""
    tools = line.fields.get("tools")
    tools = _parsed(tools) if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise line.error("the field 'tools' must be a list of objects, or one as JSON text.")
    return tools


def _parsed(text: str) -> Any:
    """The JSON value that a text holds, or the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
