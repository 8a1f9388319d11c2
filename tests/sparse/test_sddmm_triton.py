"""The Triton kernel under Triton's interpreter, on the CPU: the tests of `test_sddmm.py`.

Triton reads ``TRITON_INTERPRET`` when it is imported, and something else may have imported it in
this process; so the tests run in one of their own. And the kernel compiled for GPUs, which needs
none.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # starts engines or programs


def test_the_kernel_is_right():
    pytest.importorskip("triton")
    repository = Path(__file__).resolve().parents[2]
    found = subprocess.run(
        # numpy warns of what is not finite, in products that no entry is picked from
        [
            *(sys.executable, "-m", "pytest", "-W", "ignore::RuntimeWarning"),
            *("tests/sparse/test_sddmm.py", "-k", "triton"),
        ],
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


@pytest.mark.parametrize("number", ["*bf16", "*fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus(number, capability):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from gem_ds.sddmm.strips import ROWS, TILE
    from gem_ds.sddmm.triton_kernel import TOKENS, make_strips

    types = {"strips": "*fp32", "dy": number, "x": number, "num_rows": "i32", "stride": "i32"}
    sizes = {"ROWS": ROWS, "TILE": TILE, "TOKENS": TOKENS, "WIDENS": False}
    signature = {
        name: "constexpr" if name in sizes else types.get(name, "*i32")
        for name in make_strips.arg_names
    }
    source = triton.compiler.ASTSource(fn=make_strips, signature=signature, constexprs=sizes)
    target, options = GPUTarget("cuda", capability, 32), {"enable_fp_fusion": True}
    compiled = triton.compile(source, target=target, options=options)
    assert ("mma" in compiled.asm["ptx"]) == (number != "*fp32"), "16 bits go to tensor cores"
    assert compiled.asm["cubin"]
