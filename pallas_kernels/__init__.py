"""The attention operation of decoders that read one, or a mix of several, key-value caches."""

from pallas_kernels.api import attention, implementations

__all__ = ["attention", "implementations"]
