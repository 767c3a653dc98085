"""Time to first token and time per output token of several models, measured in turns."""

import dataclasses
import statistics
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusedkv_jax.cache import KVCache
from fusedkv_jax.generation import SamplingParams, loop
from fusedkv_jax.generation.prefill import extend
from fusedkv_jax.generation.sampling import SamplerInputs
from fusedkv_jax.model import Decoder


@dataclasses.dataclass(frozen=True)
class Latency:
    """Medians of one model.

    Attributes:
      first_token: seconds from the prompt to the first token.
      output_token: seconds for each token after that.
    """

    first_token: float
    output_token: float


def measure(
    models: Mapping[str, Decoder], prompt: np.ndarray, *, new_tokens: int, repeats: int
) -> dict[str, Latency]:
    """Decode greedily from one prompt, every model in each round, after a round of warm-up.

    Taking turns spreads a disturbance of the machine over all models. What is timed are the
    two compiled programs of `fusedkv_jax.generate`.

    Args:
      models: by name.
      prompt: [T] int32 token ids. T may exceed the models' context: time does not depend on it.
      new_tokens: tokens decoded each time, the first included; at least 2.
      repeats: rounds that count.
    """
    splits = {name: (model.config, *nnx.split(model)) for name, model in models.items()}
    rounds = [
        {name: _once(split, prompt, new_tokens) for name, split in splits.items()}
        for _ in range(repeats + 1)
    ][1:]

    def median(name: str, place: int) -> float:
        return statistics.median(times[name][place] for times in rounds)

    return {name: Latency(median(name, 0), median(name, 1)) for name in models}


def _once(split: tuple, prompt: np.ndarray, new_tokens: int) -> tuple[float, float]:
    """(seconds to the first token, seconds for each later one)."""
    config, graph, params = split
    length, total = len(prompt), len(prompt) + new_tokens
    inputs = SamplerInputs.create([SamplingParams(temperature=0.0)])
    tokens = np.zeros((1, total), np.int32)
    tokens[0, :length] = prompt
    no_stops = np.full((1, 1), -1, np.int32)
    arrays = (tokens, np.array([length]), np.array([total]), no_stops)
    prompts, *arrays = (jnp.asarray(array, jnp.int32) for array in (prompt[None], *arrays))
    cache = KVCache.create(config, batch_size=1, max_length=total)
    jax.block_until_ready((params, prompts, arrays, cache, inputs))
    start = time.perf_counter()
    logits, cache = extend(graph, params, prompts, arrays[1], cache)
    state = loop.begin(logits, *arrays, cache, inputs)
    state.lengths.block_until_ready()
    first = time.perf_counter()
    state = loop.decode(graph, params, state, inputs)
    state.lengths.block_until_ready()
    return first - start, (time.perf_counter() - first) / (new_tokens - 1)
