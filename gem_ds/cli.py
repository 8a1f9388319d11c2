"""The programs by their names, and how each of them ends.

    gem-ds train ...      gem-ds eval gsm8k ...      gem-ds export ... | compare ... | plan ...

``launch/train.py``, ``python -m eval.gsm8k`` and so on run the same. Nothing of a program is
imported before it is called for.
"""

from __future__ import annotations

import os
import select
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from gem_ds.errors import Interrupted, PeerError, sentence_of, sentence_of_limit

#: Where a program's ``main(argv)`` is, which raises what is wrong as a sentence, and what it does.
PROGRAMS = {
    "train": ("gem_ds.train.main", "fine-tune a model; writes delta.safetensors"),
    "eval gsm8k": ("gem_ds.evaluate.gsm8k", "exact match on GSM8K"),
    "eval passk": ("gem_ds.evaluate.passk", "pass@k on MBPP or HumanEval, in a sandbox"),
    "eval classification": (
        "gem_ds.evaluate.classification",
        "GLUE and SuperGLUE: candidates' likelihoods, or an encoder's head",
    ),
    "eval squad": ("gem_ds.evaluate.squad", "SQuAD, and STS-B by a causal model"),
    "eval score": ("gem_ds.evaluate.score", "score samples.jsonl again, without a model"),
    "export": ("gem_ds.formats.export", "base model and delta in a format of others"),
    "import": ("gem_ds.formats.adapter", "an adapter of SHiRA or of the tuner as a delta"),
    "delta info": ("gem_ds.deltas.info", "what a delta or a mask holds"),
    "delta diff": ("gem_ds.deltas.diff", "what two deltas of one base have in common"),
    "delta merge": ("gem_ds.deltas.merge", "several tasks' deltas as one"),
    "prune": ("gem_ds.pruning.prune_main", "a model's least weights set to 0, as a folder"),
    "ebft": ("gem_ds.pruning.ebft_main", "a pruned model's blocks fitted to the dense ones"),
    "report": ("gem_ds.report.main", "a run as a page: where its entries lie, its curves"),
    "compare": (
        "gem_ds.comparison.main",
        "methods x tasks x seeds x learning rates, of one YAML file",
    ),
    "plan": ("gem_ds.planning.main", "what a run needs, from config.json alone"),
}

_STDOUT = 1

USAGE = f"""\
usage: gem-ds PROGRAM [flags]

{chr(10).join(f"    gem-ds {name:20} {about}" for name, (_, about) in PROGRAMS.items())}

`gem-ds PROGRAM --help` tells its flags. On several GPUs: deepspeed --module gem_ds.train [flags]"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``gem-ds``; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    for length in (2, 1):
        if (name := " ".join(words[:length])) in PROGRAMS:
            return run(name, words[length:])
    is_asked = words[:1] in (["-h"], ["--help"])
    with suppress(BrokenPipeError):
        print(USAGE, file=sys.stdout if is_asked else sys.stderr)
    _end_output()
    return 0 if is_asked else 2


def run(program: str, argv: Sequence[str] | None = None) -> int:
    """Run one of :data:`PROGRAMS`, by default with this process's flags; returns the exit status.

    That is 0, or 1 after an error, which is told in one sentence on standard error, or 130 after an
    interruption. Once ranks have met, rank 0 alone tells. Where nobody reads on what is printed, as
    behind ``| head``, nothing is told of that.
    """
    from safetensors import SafetensorError

    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to each other
    module, rank = import_module(PROGRAMS[program][0]), int(os.environ.get("RANK") or 0)
    try:
        result = module.main(argv)
        return result if isinstance(result, int) else 0
    except PeerError:
        return 1
    except Interrupted:
        sentence, status = "Stopped; the same command goes on from here.", 130
    except KeyboardInterrupt:
        sentence, status = "" if rank else "Interrupted.", 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not _is_read():
            return 1
        told = sentence_of_limit(error)
        if told is None and not isinstance(error, (ValueError, OSError, SafetensorError)):
            raise
        sentence = f"Error: {f'On rank {rank}: ' if rank else ''}{told or sentence_of(error)}"
        status = 1
    finally:
        _end_output()
    if sentence:
        print(sentence, file=sys.stderr, flush=True)
    return status


def _is_read() -> bool:
    """Whether somebody still reads standard output."""
    poll = select.poll()
    poll.register(_STDOUT, 0)  # an error is told in any case
    return not poll.poll(0)


def _end_output() -> None:
    """Print what is left to be; where nobody reads on, it goes nowhere and nothing is told."""
    if sys.stdout is None:  # it was closed from the start
        return
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    if not _is_read():
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), _STDOUT)


if __name__ == "__main__":
    sys.exit(main())
