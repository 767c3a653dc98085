"""Time to first token and time per output token of several models, measured in turns."""

import dataclasses
import statistics
import time
from collections.abc import Mapping

import numpy as np

from fusedkv_jax.generation import SamplingParams
from fusedkv_jax.generation.batches import Batch
from fusedkv_jax.generation.engine import OfflineEngine
from fusedkv_jax.generation.requests import PreparedRequest
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

    Taking turns spreads a disturbance of the machine over all models. What is timed is a batch of
    `fusedkv_jax.generate` itself, so the programs are those that users run.

    Args:
      models: by name.
      prompt: [T] int32 token ids. T may exceed the models' context: time does not depend on it.
      new_tokens: tokens decoded each time, the first included; at least 2.
      repeats: rounds that count.
    """
    engines = {name: OfflineEngine(model) for name, model in models.items()}
    rounds = [
        {name: _once(engine, prompt, new_tokens) for name, engine in engines.items()}
        for _ in range(repeats + 1)
    ][1:]

    def median(name: str, place: int) -> float:
        return statistics.median(times[name][place] for times in rounds)

    return {name: Latency(median(name, 0), median(name, 1)) for name in models}


def _once(engine: OfflineEngine, prompt: np.ndarray, new_tokens: int) -> tuple[float, float]:
    """(seconds to the first token, seconds for each later one)."""
    tokens = tuple(prompt.tolist())
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)
    # Not by `make_requests`, which would refuse a prompt beyond the context.
    request = PreparedRequest(0, tokens, greedy, len(tokens) + new_tokens, (), None, ())
    batch = Batch(engine, [request])
    start = time.perf_counter()
    batch.step(new_tokens)
    first = time.perf_counter()
    (rest,) = batch.step(new_tokens)
    later = time.perf_counter() - first
    assert rest.ended and len(rest.tokens) == new_tokens - 1
    return first - start, later / (new_tokens - 1)
