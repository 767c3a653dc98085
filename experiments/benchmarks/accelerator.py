"""The suite `accelerator`: what only the device can tell, of the kernels and of whole models."""

from collections.abc import Callable

import jax

from experiments.benchmarks import cpu, kernels, speed
from experiments.benchmarks.report import Measurement
from fusedkv_jax import presets
from fusedkv_jax.config import ModelConfig

PRESETS = ("332m", "1_5b")
PROMPTS = (2048, 8192)


def measurements(
    *, quick: bool, rounds: int, torch_compile: bool
) -> dict[str, Callable[[], Measurement]]:
    """The measurements of the suite by name; `kernels.timed`, then `models`."""
    platform = jax.devices()[0].platform
    timed = kernels.timed(platform, quick=quick, rounds=rounds, torch_compile=torch_compile)
    return timed | models(quick=quick, rounds=rounds)


def models(*, quick: bool, rounds: int) -> dict[str, Callable[[], Measurement]]:
    """First and later tokens of `fusedkv` against `mha`: random weights, bfloat16, batch 1."""
    if quick:
        toy = ModelConfig(**cpu.TOY)
        configs = {"toy": toy.replace(num_kv_heads=toy.num_heads)}
    else:
        configs = {name: presets.get(name) for name in PRESETS}
    return {
        f"latency_{name}_{prompt}": lambda config=config, prompt=prompt: speed.measure_latency(
            config.replace(dtype="bfloat16", param_dtype="bfloat16"),
            layouts=("mha", "fusedkv"),
            prompt=prompt,
            new_tokens=4 if quick else 65,
            rounds=rounds,
            first_token=0.55,
        )
        for name, config in configs.items()
        for prompt in ((24,) if quick else PROMPTS)
    }
