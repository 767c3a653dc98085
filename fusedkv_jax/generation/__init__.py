"""Prefill, decoding and sampling."""

from fusedkv_jax.generation.beam import beam_search
from fusedkv_jax.generation.conversation import chat
from fusedkv_jax.generation.generate import generate, stream, warm_up
from fusedkv_jax.generation.logprobs import Logprob
from fusedkv_jax.generation.params import BeamSearchParams, SamplingError, SamplingParams
from fusedkv_jax.generation.prefill import decode_step, prefill
from fusedkv_jax.generation.requests import LogitsError, PromptError
from fusedkv_jax.generation.results import Completion, Delta, Output, Rates
from fusedkv_jax.generation.settings import EngineSettings
from fusedkv_jax.generation.speculation import SelfSpeculation

__all__ = [
    "BeamSearchParams",
    "Completion",
    "Delta",
    "EngineSettings",
    "Logprob",
    "LogitsError",
    "Output",
    "PromptError",
    "Rates",
    "SamplingError",
    "SamplingParams",
    "SelfSpeculation",
    "beam_search",
    "chat",
    "decode_step",
    "generate",
    "prefill",
    "stream",
    "warm_up",
]
