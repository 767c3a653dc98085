"""Prefill, decoding and sampling."""

from typing import TYPE_CHECKING

from fusedkv_jax.lazy import lazy_names

__all__ = [
    "BeamSearchParams",
    "Completion",
    "Delta",
    "EngineSettings",
    "LogitsError",
    "Logprob",
    "Output",
    "PromptError",
    "Rates",
    "SamplingError",
    "SamplingParams",
    "SelfSpeculation",
    "StructuredOutputsParams",
    "beam_search",
    "chat",
    "decode_step",
    "generate",
    "prefill",
    "stream",
    "warm_up",
]

if TYPE_CHECKING:
    from fusedkv_jax.generation.api import generate, stream, warm_up
    from fusedkv_jax.generation.beam import beam_search
    from fusedkv_jax.generation.conversation import chat
    from fusedkv_jax.generation.params import BeamSearchParams, SamplingError, SamplingParams
    from fusedkv_jax.generation.requests import LogitsError, PromptError
    from fusedkv_jax.generation.results import Completion, Delta, Logprob, Output, Rates
    from fusedkv_jax.generation.settings import EngineSettings
    from fusedkv_jax.generation.speculation import SelfSpeculation
    from fusedkv_jax.generation.steps import decode_step, prefill
    from fusedkv_jax.generation.structured import StructuredOutputsParams
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        __all__,
        {
            "api": ["generate", "stream", "warm_up"],
            "beam": ["beam_search"],
            "conversation": ["chat"],
            "params": ["BeamSearchParams", "SamplingError", "SamplingParams"],
            "requests": ["LogitsError", "PromptError"],
            "results": ["Completion", "Delta", "Logprob", "Output", "Rates"],
            "settings": ["EngineSettings"],
            "speculation": ["SelfSpeculation"],
            "steps": ["decode_step", "prefill"],
            "structured": ["StructuredOutputsParams"],
        },
    )
