r"""How a problem is put to a model: as text, or as messages that its chat template renders.

    text            {system}{question} {answer}\n\n{question} {answer}\n\n{question}
    one turn        system: {system}   user: all of that text but the system
    several turns   system: {system}   user: {question}   assistant: {answer}   user: {question}

These are the prompts of lm-evaluation-harness 0.4.13 (`Task.fewshot_context`), and its flags. Where
a template refuses a system message, the harness leaves it out; here that is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gem_ds.data.tasks import Prompt
from gem_ds.flags import option

_RECORD = "prompt_form"  # among the settings that a sample names


@dataclass(frozen=True, kw_only=True)
class PromptForm:
    """The flags that say how a problem is put."""

    apply_chat_template: bool = option(
        False, "Ask in messages, as chat models want it, by the tokenizer's chat template."
    )
    system_instruction: str | None = option(
        None,
        "What a system message says; without a chat template it begins the prompt.",
        aliases=["--system_prompt"],
    )
    fewshot_as_multiturn: bool | None = option(
        None, "Worked problems are turns of their own (default: with --apply_chat_template)."
    )

    def __post_init__(self) -> None:
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ValueError(
                "--fewshot_as_multiturn makes turns of a chat: pass --apply_chat_template too."
            )

    def prompt(
        self, question: str, shots: Sequence[tuple[str, str]], delimiter: str = ""
    ) -> Prompt:
        """The prompt of a question behind worked ones with their answers."""
        worked = "".join(f"{asked}{delimiter}{answer}\n\n" for asked, answer in shots)
        system = self.system_instruction or ""
        if not self.apply_chat_template:
            return f"{system}{worked}{question}"
        messages = [("system", system)] if system else []
        if self.fewshot_as_multiturn is False:
            question = worked + question
        else:
            for asked, answer in shots:
                messages += [("user", asked), ("assistant", answer)]
        messages.append(("user", question))
        return [{"role": role, "content": content} for role, content in messages]

    def recorded(self, num_fewshot: int) -> dict[str, Any]:
        """What samples name beside other settings, so that they can be scored again."""
        if self == DEFAULT_FORM:
            return {}
        return {_RECORD: {**asdict(self), "num_fewshot": num_fewshot}}


DEFAULT_FORM = PromptForm()


def recorded_form(settings: Mapping[str, Any], num_seen: int) -> tuple[PromptForm, int]:
    """The form that samples of these settings had, and how many worked problems, else as seen."""
    if (record := settings.get(_RECORD)) is None:
        return DEFAULT_FORM, num_seen
    try:
        flags = dict(record)
        num_fewshot = int(flags.pop("num_fewshot"))
        return PromptForm(**flags), num_fewshot
    except (TypeError, ValueError, KeyError):
        raise ValueError(
            f"The samples name a {_RECORD} that no evaluation writes ({record!r}): draw them again."
        ) from None
