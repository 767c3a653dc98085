"""The attention operation of decoders that read one, or a mix of several, key-value caches."""

import pallas_kernels.xla_flags  # noqa: F401, I001 (before anything computes)
from pallas_kernels.api import attention, implementations
from pallas_kernels.combine import combine
from pallas_kernels.paged import Pages, paged_attention
from pallas_kernels.quantized import Quantized, quantize
from pallas_kernels.stacked import Stacked

__all__ = [
    "Pages",
    "Quantized",
    "Stacked",
    "attention",
    "combine",
    "implementations",
    "paged_attention",
    "quantize",
]
