r"""Where an output runs on into another conversation: what a model writes that does not stop.

    ... #### 18<|im_end|>        ... #### 18            ... The answer is 18.
    <|im_start|>user             ### Instruction:       user
    Tom has 3 pens ...           Tom has 3 pens ...     Tom has 3 pens ...

It ends before the first marker of a turn behind its first number: the special tokens of published
chat templates, or words at the start of a line that say who speaks or that a question follows. A
marker of the answering side ends it only behind an announced answer: it may as well begin it.
After an announced answer, a paragraph that tells a story and asks is the next problem.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_ASKER = (
    r"q|(?:(?:next|new|another|follow-?up)\ )?(?:question|problem|exercise|task|example)"
    r"|(?:GPT4\ correct\ |the\ )?(?:user|human)|instructions?|input|prompt|query|student|system"
    r"|用户|问题|问|题目|ユーザー|pregunta|frage|вопрос"
)
_ANSWERER = r"(?:GPT4\ correct\ )?(?:assistant|ai|bot|chatbot|model|response)|助手|答"
#: Groups by the side that speaks next; what only ends a turn is the asker's.
_TURN = re.compile(
    rf"""
    (?P<token>  # <|user|>, <start_of_turn>, [INST], [|user|], </s>
        <\|[^\s<>|]{{1,40}}\|> | \[\|[a-z_]{{1,20}}\|\] | \[/?(?:INST|SYSTEM_PROMPT)\] | <</?SYS>>
      | </?(?:s|bos|eos|eoa|eoh|user|human|bot|assistant|question|start_of_turn|end_of_turn)>
      | <extra_id_[0-9]{{1,3}}> | </answer>
    )
  | (?P<asked> \bQuestion\s?[0-9]{{0,4}}\s?: )
  | \n [\s*\#>_\[(]{{0,9}} (?: (?P<asker> {_ASKER} ) | (?P<answerer> {_ANSWERER} ) )
    \ ?\#?[0-9]{{0,4}} [ *_\])]{{0,4}} :
  | \n (?P<asker_short> Q[0-9]{{0,4}} ) \.[ ]
  | \n [ \t]{{0,3}} [*\#_\[]{{1,8}} \ ? (?P<headed> {_ASKER} )
    \ ?\#?[0-9]{{0,4}} [ *_\]]{{0,4}} (?=\n)
  | \n [ \t]{{0,3}} (?: (?P<asker_alone> user|human|system )
                    | (?P<answerer_alone> assistant|model ) ) [ \t]{{0,3}} (?=\n|$)
  | (?<=[0-9.!?$%)}}*]) (?-i: (?P<glued> user|system ) | (?P<answerer_glued> assistant|model ) )
    [ \t]{{0,3}} (?=\n|$)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_ANSWERING_TOKEN = re.compile(r"assistant|bot|model|/INST", re.IGNORECASE)
_ANNOUNCED = re.compile(r"\#{4}|boxed|\banswer\b", re.IGNORECASE)

#: After an answer in the dataset's own form, a story that asks something is the next problem.
_MARKED_ANSWER = re.compile(r"\#{4}\s{0,3}[^\w\n]{0,5}[0-9]")
_QUESTION = r"(?:(?:How|What|If)\b[^\n?]{0,200}\?|Find\b[^\n.?]{0,200}[.?])"
_ASKED = re.compile(rf"[.!]\s{{1,3}}{_QUESTION}")
#: After another one, where it is a paragraph of its own and no second thought.
_OTHER_ANSWER = re.compile(
    r"(?:boxed\s?\{|\banswer\b)[^\n0-9]{0,60}[0-9][^\n]{0,80}", re.IGNORECASE
)
_STORY = re.compile(
    r"\n\s{0,4}\n(?!Wait|But|Oops|Hmm|Actually|No\b|Let|To\b|Check|Verif|Sorry|I\b|We\b)"
    rf"[A-Z][^\n]{{0,600}}[.!]\ {_QUESTION}"
)


def end_of_answer(text: str, first_number: int) -> int:
    """Where a text runs on, given where its first number begins; its length if it does not."""
    ends = [len(text), *_turns(text, first_number)]
    if (marked := _MARKED_ANSWER.search(text)) and (asked := _ASKED.search(text, marked.end())):
        ends.append(asked.start())
    if (given := _OTHER_ANSWER.search(text)) and (story := _STORY.search(text, given.end())):
        ends.append(story.start())
    return min(ends)


def _turns(text: str, first_number: int) -> Iterator[int]:
    """Where the first turn begins that ends the answer, if one does."""
    announced = _ANNOUNCED.search(text)
    is_asked = False  # the text begins with a question, and the answer is still to come
    for turn in _TURN.finditer(text):
        kind = str(turn.lastgroup)
        answers = kind.startswith("answerer") or bool(
            kind == "token" and _ANSWERING_TOKEN.search(turn[0])
        )
        if turn.start() <= first_number:
            is_asked = not answers
        elif answers and is_asked:
            is_asked = False
        elif not answers or (announced and announced.start() < turn.start()):
            yield turn.start()
            return
