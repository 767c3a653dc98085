"""The suite `cpu`: what this library does on a processor, next to what it should."""

from collections.abc import Callable
from typing import Any

from experiments.benchmarks import programs, speed
from experiments.benchmarks.report import Measurement
from fusedkv_jax.config import ModelConfig

# Llama blocks with grouped queries: 28 million parameters.
GEOMETRY: dict[str, Any] = dict(
    vocab_size=8192,
    num_layers=8,
    d_model=512,
    num_heads=8,
    num_kv_heads=4,
    d_ff=1408,
    max_length=4096,
    qk_norm=False,
    norm_eps=1e-5,
)
TOY: dict[str, Any] = dict(
    vocab_size=128,
    num_layers=4,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    d_ff=64,
    max_length=64,
    qk_norm=False,
)


def measurements(
    *, quick: bool, rounds: int, torch_compile: bool
) -> dict[str, Callable[[], Measurement]]:
    """The measurements of the suite by name.

    Args:
      quick: toy sizes, whose numbers say only that the measurement works.
      rounds: turns of each contestant.
      torch_compile: let a version of transformers compiled by PyTorch compete in decoding.
    """
    config = ModelConfig(**(TOY if quick else GEOMETRY))
    toy = ModelConfig(**TOY)
    return {
        "training": lambda: speed.measure_training(
            config, batch=2 if quick else 8, length=16 if quick else 256, rounds=rounds
        ),
        "decoding": lambda: speed.measure_decoding(
            config,
            batches=(2,) if quick else (1, 8),
            prompt=8 if quick else 128,
            new_tokens=4 if quick else 128,
            rounds=rounds,
            torch_compile=torch_compile,
        ),
        "latency": lambda: speed.measure_latency(
            config.replace(num_kv_heads=config.num_heads),
            prompt=24 if quick else 4096,
            new_tokens=4 if quick else 33,
            rounds=rounds,
        ),
        "recompilation": lambda: programs.measure_recompilation(
            toy.replace(layout="fusedkv"),
            prompts=12 if quick else 200,
            batch=2 if quick else 8,
            longest=32 if quick else 64,
        ),
        "depth": lambda: programs.measure_depth(
            toy, depths=(4, 8) if quick else (12, 48), rounds=1 if quick else rounds
        ),
    }
