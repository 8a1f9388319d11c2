"""The Triton kernel under Triton's interpreter, on the CPU: the tests of `test_sddmm.py`.

Triton reads ``TRITON_INTERPRET`` when it is imported, and something else may have imported it in
this process; so the tests run in one of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # starts engines or programs


def test_the_kernel_is_right() -> None:
    pytest.importorskip("triton")
    repository = Path(__file__).resolve().parents[2]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/sparse/test_sddmm.py", "-k", "triton"],
        cwd=repository,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert " passed" in found.stdout
    assert "skipped" not in found.stdout
