"""The short form of `tests.kills`: one run of each program, by the signal that it bears least."""

import random

import pytest

from tests import kills
from tests.kills import CASES, Suite
from tests.tiny_model import one_rank

pytestmark = pytest.mark.slow  # starts engines or programs


def test_killed_programs_come_to_the_undisturbed_result(tmp_path, monkeypatch):
    seed = random.randrange(2**32)
    print(f"The moments are those of seed {seed}")
    on_two_ranks = next(case for case in CASES if (case.world_size, case.stage) == (2, 3))
    by_program = {case.program: case for case in reversed(CASES)}
    monkeypatch.setattr(kills, "PATIENCE", 10)  # whatever is then killed goes on all the same
    with one_rank():
        suite = Suite(tmp_path, random.Random(seed))
        assert suite.kill(on_two_ranks, "fork", "SIGSTOP") == ""
        for program in ("export", "eval gsm8k"):
            assert suite.kill(by_program[program], "fork", "SIGKILL") == ""
