"""The shared tests on a real NVIDIA GPU, in bfloat16 where rounding is tested.

`JAX_PLATFORMS=cuda,cpu python -m pytest tests/pallas_kernels/gpu/test_on_gpu.py`
"""

import jax
import pytest

from tests.pallas_kernels.attention_cases import AttentionCases
from tests.pallas_kernels.implementation import Implementation
from tests.pallas_kernels.stored_cases import PagedCases, QuantizedCases

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")


class OnGpu(Implementation):
    implementation = "triton"
    unsupported = frozenset({"float8_e4m3b11fnuz", "int4"})


class TestOnGpu(OnGpu, AttentionCases):
    pass


class TestOnGpuQuantized(OnGpu, QuantizedCases):
    pass


class TestOnGpuPaged(OnGpu, PagedCases):
    pass
