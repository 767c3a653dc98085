"""Prefill, decoding and sampling."""

from fusedkv_jax.generation.generate import Completion, PromptError, generate, warm_up
from fusedkv_jax.generation.prefill import decode_step, prefill
from fusedkv_jax.generation.sampling import SamplingError, SamplingParams

__all__ = [
    "Completion",
    "PromptError",
    "SamplingError",
    "SamplingParams",
    "decode_step",
    "generate",
    "prefill",
    "warm_up",
]
