"""The Triton kernels; importing this package needs triton, so nothing imports it early."""
