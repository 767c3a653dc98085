"""The attention operation of decoders that read one, or a mix of several, key-value caches."""

import importlib
from typing import TYPE_CHECKING

import pallas_kernels.xla_flags  # noqa: F401 (before anything computes)

__all__ = [
    "PagedStream",
    "Pages",
    "Quantized",
    "RaggedRows",
    "Stacked",
    "attention",
    "combine",
    "implementations",
    "paged_attention",
    "quantize",
    "ragged_attention",
]

if TYPE_CHECKING:
    from pallas_kernels.api import attention, implementations
    from pallas_kernels.combining import combine
    from pallas_kernels.paged import paged_attention
    from pallas_kernels.paged_stream import PagedStream
    from pallas_kernels.pages import Pages
    from pallas_kernels.quantized import Quantized, quantize
    from pallas_kernels.ragged import ragged_attention
    from pallas_kernels.ragged_rows import RaggedRows
    from pallas_kernels.stacked import Stacked
else:
    # At the first use: whoever only reads a configuration does not wait for JAX.
    _MODULES = {
        "PagedStream": "paged_stream",
        "Pages": "pages",
        "Quantized": "quantized",
        "RaggedRows": "ragged_rows",
        "Stacked": "stacked",
        "attention": "api",
        "combine": "combining",
        "implementations": "api",
        "paged_attention": "paged",
        "quantize": "quantized",
        "ragged_attention": "ragged",
    }

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module 'pallas_kernels' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"pallas_kernels.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
