"""The trusted side: runs the tests where the candidate is not, and asks the jail for results.

In the tests, the candidate's names are stand-ins (`remote`). Calling one sends the arguments into
the jail as plain data and gives back the result as plain data, of exact builtin types; comparing it
with the expected value happens here. So the expected values and the tests' text never enter the
jail, and an object that equals everything gets no chance to say so. Containers among arguments and
results are kept alike on both sides (`link`).

What is not plain stays in the jail, and a stand-in takes its place here. Where the tests compare it
with a value of theirs that is not plain either (an array, a path), or hand over such a value, they
have to run beside the program.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from gem_ds.evaluate.sandbox.conversation import CandidateLostError, Conversation
from gem_ds.evaluate.sandbox.link import Channel
from gem_ds.evaluate.sandbox.remote import NeedsJailError, Remote

_MAX_DETAIL = 300  # characters


def judge(
    channel: Channel,
    setup: str,
    tests: Sequence[str],
    names: Sequence[str],
    modules: Sequence[str],
    had_a_say: bool,
) -> tuple[str, str, bool]:
    """Runs tests against the program at the channel's other end.

    `names` are the program's that setup and tests use, `modules` what they use and the program is
    expected to have imported; `had_a_say` is whether the candidate's code has had a say already.
    Returns the status, a line that explains it, and whether the candidate's code had a say.
    """
    jail = Conversation(channel, had_a_say=had_a_say or len(names) > 1)
    where = "the program"
    try:
        jail.wait()
        where = "the setup"
        namespace: dict[str, Any] = {"__name__": "tests"}
        namespace |= {name: importlib.import_module(name) for name in modules}
        remotes = {name: Remote(jail, ("name", name)) for name in names}
        for number, source in enumerate([setup, *tests]):
            where = f"test {number}" if number else where
            namespace |= remotes if number < 2 else {}  # the setup may define the entry point too
            exec(compile(source, where, "exec", dont_inherit=True), namespace)
        where = "the program's end"
        jail.finish()
    except CandidateLostError:
        return "crashed", f"the process ended during {where}", jail.had_a_say
    except NeedsJailError:
        return "in_jail", "", True
    except BaseException as error:
        status = "crashed" if isinstance(error, MemoryError) and error is jail.raised else "failed"
        return status, _describe(where, error, jail), jail.had_a_say
    return "passed", "", jail.had_a_say


def _describe(where: str, error: BaseException, jail: Conversation) -> str:
    """One line of printable characters, made of text of unknown origin."""
    if error is jail.raised:  # whose arguments may be the candidate's: they are not asked
        text = f"the program raised {jail.raised_text}"
    elif isinstance(error, AssertionError) and not error.args:
        text = "the assertion is false"
    else:
        text = type(error).__name__
        try:
            text += f": {error}"
        except BaseException:  # a message made of what the program returned
            text += ", whose message cannot be shown"
    line = " ".join(f"{where}: {text}".split())[:_MAX_DETAIL]
    return "".join(character if character.isprintable() else "?" for character in line)
