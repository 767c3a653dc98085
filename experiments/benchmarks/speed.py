"""Training and decoding against transformers; first and later tokens against `mha`."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from experiments.benchmarks import latency, torch_llama
from experiments.benchmarks.report import Measurement, Target
from experiments.benchmarks.turns import take_turns
from fusedkv_jax import training
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.generation import SamplingParams, generate
from fusedkv_jax.model import Decoder
from fusedkv_jax.training.state import abstract_model

LAYOUTS = ("mha", "fusedkv_lite", "fusedkv")


def _random_tokens(config: ModelConfig, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, (rows, length), np.int32)


def train_step(config: ModelConfig, tokens: np.ndarray, targets: np.ndarray) -> Callable[[], float]:
    """The library's train step on one batch, AdamW and clipping included; gives the loss."""
    settings = training.OptimizerConfig()
    optimizer = training.make_optimizer(settings, 1000)
    graphdef, _ = abstract_model(config)
    schedule = training.learning_rate_schedule(settings, 1000)
    state = training.create_state(config, optimizer, 0)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": np.zeros_like(tokens),
        "positions": positions,
        "loss_mask": np.ones(tokens.shape, bool),
    }
    step = jax.jit(training.make_train_step(graphdef, optimizer, schedule), donate_argnums=0)

    def call() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return call


def measure_training(config: ModelConfig, *, batch: int, length: int, rounds: int) -> Measurement:
    """Tokens per second of a whole train step in float32, against transformers."""
    title = "Training: tokens per second, forward, backward, clipping and AdamW, float32"
    if reason := torch_llama.missing():
        return Measurement(title, skipped=reason)
    data = _random_tokens(config, batch, length + 1)
    arguments = (config, data[:, :-1], data[:, 1:])
    contestants = {
        "fusedkv_jax": train_step(*arguments),
        "transformers": torch_llama.train_step(*arguments),
    }
    seconds = take_turns(contestants, rounds)
    ratio = seconds["transformers"] / seconds["fusedkv_jax"]
    return Measurement(
        title,
        _setting(config) | {"batch": batch, "length": length},
        _rates(seconds, batch * length),
        [Target("training, times transformers", ratio, ">=", 1.0)],
    )


def measure_decoding(
    config: ModelConfig,
    *,
    batches: tuple[int, ...],
    prompt: int,
    new_tokens: int,
    rounds: int,
    torch_compile: bool,
) -> Measurement:
    """Tokens per second of greedy `generate`, prompt included, against transformers."""
    title = "Decoding: tokens per second of generate, float32, static cache"
    if reason := torch_llama.missing():
        return Measurement(title, skipped=reason)
    model = Decoder(config, rngs=nnx.Rngs(0))
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens)
    rows, targets = [], []
    for batch in batches:
        prompts = _random_tokens(config, batch, prompt)
        lists = prompts.tolist()
        contestants = {
            "fusedkv_jax": lambda lists=lists: generate(model, lists, params),
            "transformers": torch_llama.generator(config, prompts, new_tokens, compiled=False),
        }
        if torch_compile:
            compiled = torch_llama.generator(config, prompts, new_tokens, compiled=True)
            contestants["transformers, compiled"] = compiled
        seconds = take_turns(contestants, rounds)
        rows += [{**row, "batch": batch} for row in _rates(seconds, batch * new_tokens)]
        best = min(value for name, value in seconds.items() if name != "fusedkv_jax")
        name = f"decoding batch {batch}, times transformers"
        targets.append(Target(name, best / seconds["fusedkv_jax"], ">=", 2.0))
    setting = _setting(config) | {"prompt": prompt, "new_tokens": new_tokens}
    return Measurement(title, setting, rows, targets)


def measure_latency(
    config: ModelConfig,
    *,
    layouts: Sequence[str] = LAYOUTS,
    prompt: int,
    new_tokens: int,
    rounds: int,
    first_token: float = 0.58,
) -> Measurement:
    """Time to the first token and per later one with a long prompt, against `mha`.

    Args:
      config: of every model, but for the layout; the weights are random.
      layouts: `mha` and what is held against it.
      prompt: tokens.
      new_tokens: decoded each time, the first included.
      rounds: turns of each model.
      first_token: what the time to the first token should be at most, of `mha`'s.
    """
    models = {
        layout: Decoder(config.replace(layout=layout), rngs=nnx.Rngs(0)) for layout in layouts
    }
    tokens = _random_tokens(config, 1, prompt)[0]
    found = latency.measure(models, tokens, new_tokens=new_tokens, repeats=rounds)
    base = found["mha"]
    rows = [
        {
            "layout": name,
            "first token s": times.first_token,
            "of mha": times.first_token / base.first_token,
            "later token s": times.output_token,
            "of mha's": times.output_token / base.output_token,
        }
        for name, times in found.items()
    ]
    targets = [
        Target(f"TTFT of {row['layout']}, of mha's", row["of mha"], "<=", first_token)
        for row in sorted(rows, key=lambda row: row["layout"])
        if row["layout"] != "mha"
    ]
    if lite := found.get("fusedkv_lite"):
        later = lite.output_token / base.output_token
        targets.append(Target("TPOT of fusedkv_lite, of mha's", later, "<=", 1.05))
    return Measurement(
        "Latency: time to the first token (TTFT) and per later token (TPOT), batch 1",
        _setting(config) | {"dtype": config.dtype, "prompt": prompt, "new_tokens": new_tokens},
        rows,
        targets,
    )


def _rates(seconds: Mapping[str, float], tokens: int) -> list[dict]:
    return [
        {"contestant": name, "tokens/s": tokens / value, "seconds": value}
        for name, value in seconds.items()
    ]


def _setting(config: ModelConfig) -> dict[str, int | str]:
    return {
        "layers": config.num_layers,
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "heads": config.num_heads,
        "kv_heads": config.kv_heads,
        "vocab": config.vocab_size,
    }
