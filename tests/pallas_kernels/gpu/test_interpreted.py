"""The shared tests in Triton's interpreter, in a process that imports triton as its interpreter.

The single tests: `TRITON_INTERPRET=1 python -m pytest tests/pallas_kernels/gpu/interpreted.py`
"""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.pallas_kernels.gpu.toolchain import needs_triton

pytestmark = needs_triton
ROOT = pathlib.Path(__file__).parents[3]
QUICK = (
    "definition and (fused or one_token or two_tokens or segments or ring)"
    " or reads_stored_codes and one_token and int8 or random_calls or a_step and int8"
    " or wide_sources"
)


@pytest.mark.parametrize(
    "selected", [QUICK, pytest.param(f"not ({QUICK})", marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_the_shared_tests_pass_in_the_interpreter(selected):
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "tests/pallas_kernels/gpu/interpreted.py", "-q",
            "-k", selected, "-p", "no:cacheprovider", "--tb=short",
        ],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and "failed" not in done.stdout.splitlines()[-1]
