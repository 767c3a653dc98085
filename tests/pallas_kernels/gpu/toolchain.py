"""What the tests that compile for NVIDIA GPUs need, and the device they compile for."""

import importlib.util

import pytest

from pallas_kernels.gpu import static
from pallas_kernels.gpu.device import launch

_PACKAGES = ("triton", "jax_triton", "jax_cuda13_plugin")
_ABSENT = [x for x in _PACKAGES if importlib.util.find_spec(x) is None]

needs_triton = pytest.mark.skipif(
    "triton" in _ABSENT, reason="needs triton: pip install -e '.[gpu-compile]'"
)
needs_toolchain = pytest.mark.skipif(
    bool(_ABSENT), reason=f"needs {', '.join(_ABSENT)}: pip install -e '.[gpu-compile]'"
)

H100 = static.target("h100", launch)
