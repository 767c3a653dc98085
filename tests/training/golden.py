"""Loss curves of 50 steps for every layout; `python -m tests.training.golden` writes them anew.

They change where the computation does: say why in the commit that changes them.
"""

import json
import os
import pathlib
import platform

from tests.plain_code import xla_flags

# As in the other tests: plain code, quickly compiled. It rounds elsewhere than fast code.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.update(XLA_FLAGS=xla_flags(os.environ))

import jax
import jaxlib
import numpy as np

from fusedkv_jax import layouts
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.training import (
    OptimizerConfig,
    create_state,
    learning_rate_schedule,
    make_optimizer,
    make_train_step,
)
from fusedkv_jax.training.state import abstract_model

FILE = pathlib.Path(__file__).with_name("golden_losses.json")
STEPS = 50
OPTIONS = {  # so that all differ at this size
    "mlkv": "mlkv:m=1",
    "lite_learnable": "lite_learnable:init=normal",
    "window_hybrid": "window_hybrid:window=5,full_every=2",
}
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=5)


def small_config(layout: str, **changes) -> ModelConfig:
    depth = 8 if layout.startswith("window") else 4
    sizes = {"vocab_size": 64, "num_layers": depth, "d_model": 32, "num_heads": 4, "d_ff": 64}
    return ModelConfig(**sizes | {"layout": layout, "num_kv_heads": 2, "max_length": 64} | changes)


def batches(count: int):
    """Packed rows of learnable sequences: each token follows from the one before."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens = (rng.integers(0, 64, (8, 1)) + 5 * np.arange(33)) % 64
        inside = np.broadcast_to(np.arange(32), (8, 32))
        yield {
            "tokens": tokens[:, :-1].astype(np.int32),
            "targets": tokens[:, 1:].astype(np.int32),
            "segment_ids": (inside // 20).astype(np.int32),
            "positions": np.where(inside < 20, inside, inside - 20).astype(np.int32),
            "loss_mask": (inside != 19).astype(np.int32),
        }


def losses(layout: str, steps: int = STEPS) -> list[float]:
    """The loss of each of the first steps, on one device, in float32."""
    config, optimizer = small_config(OPTIONS.get(layout, layout)), make_optimizer(OPTIMIZER, STEPS)
    graphdef, _ = abstract_model(config)
    step = make_train_step(graphdef, optimizer, learning_rate_schedule(OPTIMIZER, STEPS))
    compiled = jax.jit(step, donate_argnums=0)
    state, found = create_state(config, optimizer, 0), []
    for batch in batches(steps):
        state, metrics = compiled(state, batch)
        found.append(float(metrics["loss"]))
    return found


def environment() -> dict[str, str]:
    """What decides the last bits: the compiler, and the instructions it may use."""
    text = pathlib.Path("/proc/cpuinfo").read_text()
    flags = set(text.partition("flags")[2].partition("\n")[0].split())
    vectors = [flag for flag in sorted(flags) if flag.startswith(("avx", "fma", "amx"))]
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "machine": platform.machine(),
        "instructions": " ".join(vectors),
        "flags": os.environ["XLA_FLAGS"],
    }


if __name__ == "__main__":
    curves = {layout: losses(layout) for layout in layouts.names()}
    FILE.write_text(json.dumps({"environment": environment(), "losses": curves}, indent=1) + "\n")
