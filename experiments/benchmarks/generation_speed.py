"""Early exit in prefill, drafts by lower layers, compressed long caches: each against without."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks.report import Measurement, Target
from experiments.benchmarks.turns import take_turns
from experiments.common import runs
from experiments.common.documents import Document
from fusedkv_jax import training
from fusedkv_jax.cache import KVCache
from fusedkv_jax.compression import Compressor
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.evaluation.longcontext_cases import heldout_texts
from fusedkv_jax.generation import EngineSettings, SamplingParams, generate
from fusedkv_jax.generation.batches import Batch
from fusedkv_jax.generation.chunked_prefill import PrefillPlan, PromptArrays
from fusedkv_jax.generation.engine import OfflineEngine
from fusedkv_jax.generation.programs import GenerationPrograms
from fusedkv_jax.generation.requests import PreparedRequest
from fusedkv_jax.generation.results import Rates
from fusedkv_jax.generation.speculation import SelfSpeculation
from fusedkv_jax.model import Decoder

DRAFTS = (2, 4, 6)


def measure_first_token(config: ModelConfig, *, prompt: int, rounds: int) -> Measurement:
    """Prefill with and without early exit, to the logits of the last token."""
    programs = GenerationPrograms.of(Decoder(config, rngs=nnx.Rngs(0)))
    prompts = PromptArrays(_random_tokens(config, prompt), np.full(1, prompt, np.int32))

    @functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
    def all_layers(
        graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array, count: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        # All layers for all tokens, the head for the last one alone: no program that users run.
        model = nnx.merge(graph, params)
        return model.observe(tokens, count, cache, lambda reading: None, rows=prompt)[:2]

    def prefill(early: bool) -> jax.Array:
        cache = programs.empty_cache(1, prompt)
        if early:
            found = programs.prefill(prompts, cache, PrefillPlan()).logits
            assert found is not None
            return found
        return all_layers(*programs.split, *map(jnp.asarray, prompts), cache)[0]

    logits: dict[str, jax.Array] = {}

    def contestant(name: str, early: bool) -> Callable[[], object]:
        def call() -> None:
            logits[name] = jax.block_until_ready(prefill(early))

        return call

    seconds = take_turns(
        {"early exit": contestant("early exit", True), "all layers": contestant("all", False)},
        rounds,
    )
    ratio = seconds["early exit"] / seconds["all layers"]
    difference = float(jnp.abs(logits["early exit"] - logits["all"]).max())
    return Measurement(
        "Prefill: time to the first token of fusedkv with and without early exit, batch 1",
        _setting(config) | {"prompt": prompt},
        [{"prefill": name, "seconds": value} for name, value in seconds.items()],
        [
            Target("time to first token with early exit, of that without", ratio, "<=", 0.55),
            Target("largest difference of their logits", difference, "<=", 1e-3),
        ],
    )


def measure_speculation(
    run: runs.FinishedRun, *, prompt: int, new_tokens: int, rounds: int
) -> Measurement:
    """Greedy tokens per second, one request at a time, plain and with several ways to draft."""
    model, config, _ = training.load_model(run.workdir)
    prompts = heldout_texts(config, prompt, 4).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    ways: dict[str, SelfSpeculation | None] = {"plain": None}
    # The first layer alone, and the lower half, whose drafts leave nothing to roll back.
    for exit_layer in (1, config.model.kv_layout.prefill_depth):
        drafter = functools.partial(SelfSpeculation, exit_layer=exit_layer)
        for k in DRAFTS:
            ways[f"{exit_layer} layers draft {k}"] = drafter(draft_tokens=k)
        most = f"{exit_layer} layers draft up to {max(DRAFTS)}"
        ways[most] = drafter(draft_tokens=max(DRAFTS), adaptive=True)
    outputs: dict[str, list] = {}

    def contestant(name: str) -> Callable[[], object]:
        def call() -> None:
            found = generate(model, prompts, params, batch_size=1, speculation=ways[name])
            outputs[name] = [completion.token_ids for completion in found]

        return call

    def accepted(name: str) -> float:
        """The share of drafted tokens that were right; not timed, as it looks in between."""
        seen = [Rates()]
        generate(model, prompts, params, batch_size=1, speculation=ways[name], progress=seen.append)
        return seen[-1].accepted / max(seen[-1].drafted, 1)

    seconds = take_turns({name: contestant(name) for name in ways}, rounds)
    total = len(prompts) * new_tokens
    rows = [
        {
            "decoding": name,
            "tokens/s": total / value,
            "times plain": seconds["plain"] / value,
            "accepted": accepted(name),
            "same tokens": outputs[name] == outputs["plain"],
        }
        for name, value in seconds.items()
    ]
    best = max(row["times plain"] for row in rows[1:])
    same = float(all(row["same tokens"] for row in rows))
    return Measurement(
        "Self-speculative decoding of a model trained with the early-exit loss, batch 1, greedy",
        _setting(config.model)
        | {"prompt": prompt, "new_tokens": new_tokens, "trained": config.name},
        rows,
        [
            Target("speculative tokens per second, times plain", best, ">=", 1.3),
            Target("the tokens are those of plain decoding", same, "==", 1.0),
        ],
    )


def measure_long_cache(
    config: ModelConfig,
    compressors: Mapping[str, Compressor],
    *,
    tokens: int,
    steps: int,
    rounds: int,
) -> Measurement:
    """Decode steps per second after a long prompt, with the whole cache and compressed ones."""
    model = Decoder(config, rngs=nnx.Rngs(0))
    room = (rounds + 1) * steps + 1  # the first token comes with prefill
    cases = {"whole cache": None, **compressors}
    runners = {name: _Runner(model, found, tokens, room) for name, found in cases.items()}
    turns = {name: functools.partial(runner.run, steps) for name, runner in runners.items()}
    seconds = take_turns(turns, rounds)
    rows = [
        {
            "cache": name,
            "tokens/s": steps / value,
            "times whole": seconds["whole cache"] / value,
            "MB": runners[name].nbytes / 1e6,
        }
        for name, value in seconds.items()
    ]
    return Measurement(
        "Decoding after a long prompt, batch 1, float32",
        _setting(config) | {"layout": config.kv_layout.spec, "prompt": tokens, "steps": steps},
        rows,
        [
            Target(f"{row['cache']}, times the whole cache", row["times whole"], ">=", 1.0)
            for row in rows[1:]
        ],
    )


class _Runner:
    """A prefilled request of `generate` that goes on by some greedy steps at each call of `run`."""

    def __init__(
        self, model: Decoder, compressor: Compressor | None, tokens: int, room: int
    ) -> None:
        engine = OfflineEngine(
            model, settings=EngineSettings(compression=compressor, bucketing=False)
        )
        prompt = tuple(_random_tokens(model.config, tokens)[0].tolist())
        greedy = SamplingParams(temperature=0.0, ignore_eos=True)
        request = PreparedRequest(0, prompt, greedy, tokens + room, (), None, ())
        self._batch = Batch(engine, [request])
        self._batch.step(1)
        self.nbytes = self._batch.cache_bytes

    def run(self, steps: int) -> None:
        """Decode; returns when the tokens are there."""
        (new,) = self._batch.step(steps)
        assert len(new.tokens) == steps


def _random_tokens(config: ModelConfig, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, (1, length), np.int32)


def _setting(config: ModelConfig) -> Document:
    names = ("num_layers", "d_model", "num_heads", "kv_heads", "d_ff", "vocab_size")
    return {name: getattr(config, name) for name in names}
