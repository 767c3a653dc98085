"""What compiling costs: nothing after warm-up, and the same at any depth."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from experiments.benchmarks.report import Measurement, Target
from fusedkv_jax import training
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.generation import SamplingParams, generate, warm_up
from fusedkv_jax.generation.programs import GenerationPrograms
from fusedkv_jax.model import Decoder
from fusedkv_jax.training.state import abstract_model, abstract_state

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
LAYOUTS = ("mha", "fusedkv", "fusedkv_lite")


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[float]]:
    """A list that gets the seconds of each compilation within the block."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILE_EVENT:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Within the block every compilation is a real one, none is read from the disk."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax asks once a process whether there is a cache
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def mixed_requests(
    config: ModelConfig, count: int, longest: int
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of many lengths with many settings, prompt and output up to `longest` tokens."""
    rng = np.random.default_rng(0)
    prompts, params = [], []
    for i in range(count):
        length = int(rng.integers(1, longest - 1))
        prompts.append(rng.integers(0, config.vocab_size, length).tolist())
        params.append(
            SamplingParams(
                temperature=float(rng.choice([0.0, 0.7, 1.3])),
                top_k=int(rng.choice([0, 5])),
                top_p=float(rng.choice([0.9, 1.0])),
                repetition_penalty=float(rng.choice([1.0, 1.2])),
                seed=i,
                max_tokens=int(rng.integers(1, longest - length + 1)),
                stop_token_ids=tuple(rng.integers(0, config.vocab_size, i % 4).tolist()),
            )
        )
    return prompts, params


def measure_recompilation(
    config: ModelConfig, *, prompts: int, batch: int, longest: int
) -> Measurement:
    """Compilations while mixed prompts are decoded, alone and in batches, after `warm_up`."""
    model = Decoder(config, rngs=nnx.Rngs(0))
    requests, params = mixed_requests(config, prompts, longest)
    with counted_compilations() as during_warm_up:
        start = time.perf_counter()
        buckets = warm_up(model, batch_size=batch, max_length=longest)
        seconds = time.perf_counter() - start
    with counted_compilations() as afterwards:
        half = prompts // 2
        for place in range(half):
            generate(model, [requests[place]], params[place])
        generate(model, requests[half:], params[half:], batch_size=batch)
    row = {
        "buckets": buckets,
        "warm-up s": seconds,
        "compilations in warm-up": len(during_warm_up),
        "prompts": prompts,
        "compilations afterwards": len(afterwards),
    }
    return Measurement(
        "Recompilation while decoding after warm-up",
        {"layout": config.kv_layout.spec, "batch": batch, "longest": longest},
        [row],
        [Target("compilations after warm-up", len(afterwards), "==", 0)],
    )


def lower_train_step(
    config: ModelConfig, *, batch: int = 2, length: int = 64
) -> jax.stages.Lowered:
    """The train step, traced and lowered from shapes alone."""
    settings = training.OptimizerConfig()
    optimizer = training.make_optimizer(settings, 100)
    graphdef, _ = abstract_model(config)
    schedule = training.learning_rate_schedule(settings, 100)
    step = training.make_train_step(graphdef, optimizer, schedule)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    names = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
    state = abstract_state(config, optimizer)
    return jax.jit(step, donate_argnums=0).lower(state, dict.fromkeys(names, tokens))


def lower_decode_loop(
    config: ModelConfig, *, batch: int = 2, length: int = 64
) -> jax.stages.Lowered:
    """The decode loop, traced and lowered from shapes alone."""
    return GenerationPrograms.abstract(config).lower_decode(batch, length)


PROGRAMS: dict[str, Callable[[ModelConfig], jax.stages.Lowered]] = {
    "train step": lower_train_step,
    "decode loop": lower_decode_loop,
}


def size(compiled: jax.stages.Compiled) -> int:
    """Instructions of a compiled program, those of its fusions and loops included."""
    return sum(" = " in line for line in (compiled.as_text() or "").splitlines())


def measure_depth(config: ModelConfig, *, depths: tuple[int, int], rounds: int) -> Measurement:
    """Program size and compile time (tracing included) of a deep model over a shallow one's."""
    rows, targets = [], []
    with without_cache():
        for layout in LAYOUTS:
            models = [config.replace(num_layers=depth, layout=layout) for depth in depths]
            for program, lower in PROGRAMS.items():
                seconds, sizes = [[], []], [0, 0]
                for _ in range(rounds):
                    for i, model in enumerate(models):
                        jax.clear_caches()  # of traces: the decode loop is jitted once for all
                        start = time.perf_counter()
                        compiled = lower(model).compile()
                        seconds[i].append(time.perf_counter() - start)
                        sizes[i] = size(compiled)
                least = [min(values) for values in seconds]
                row = {"program": f"{layout}, {program}"}
                for i, depth in enumerate(depths):
                    row |= {f"size at {depth}": sizes[i], f"compile s at {depth}": least[i]}
                ratios = sizes[1] / sizes[0], least[1] / least[0]
                rows.append(row | {"size ratio": ratios[0], "time ratio": ratios[1]})
                name = f"{layout} {program}, {depths[1]} over {depths[0]} layers"
                targets.append(Target(f"size of {name}", ratios[0], "<=", 1.2))
                targets.append(Target(f"compile time of {name}", ratios[1], "<=", 1.5))
    setting = {"d_model": config.d_model, "heads": config.num_heads, "vocab": config.vocab_size}
    return Measurement("Programs: size and compile time by depth", setting, rows, targets)
