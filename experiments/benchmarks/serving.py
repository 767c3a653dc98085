"""The suite `serving`: load on our engine and others, or on any server by its URL."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx

from experiments.benchmarks import cpu, load, served, torch_llama, turns
from experiments.benchmarks.load import Ask, Serve
from experiments.benchmarks.report import Measurement, Target
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.costs import parameter_count
from fusedkv_jax.generation import SamplingParams, generate
from fusedkv_jax.model import Decoder
from fusedkv_jax.serving import LLM, ServingSettings, StepShapes

OURS, THEIRS = "fusedkv_jax", "transformers"
OURS_HTTP, VLLM = "fusedkv_jax, HTTP", "vllm, HTTP"
Contestants = Mapping[str, contextlib.AbstractAsyncContextManager[Serve]]
Measure = Callable[[], Measurement]


class LoadSizes(NamedTuple):
    """How much load there is.

    Attributes:
        config: of the model.
        settings: of the engine.
        prompt, generated: tokens that requests have, drawn evenly.
        asks: requests of each client of a closed loop, and of the Poisson process for each seat.
        clients: of the closed loops.
        long: tokens of the prompts whose first token is timed.
    """

    config: ModelConfig
    settings: ServingSettings
    prompt: range
    generated: range
    asks: int
    clients: tuple[int, ...]
    long: int


class Others(NamedTuple):
    """Who is measured besides what runs in this process.

    Attributes:
        url: of a server that is measured instead, if any.
        vllm: Python of an environment with vLLM, which is then measured beside our server.
    """

    url: str = ""
    vllm: str = ""


_NOBODY = Others()


def sizes(quick: bool) -> LoadSizes:
    """Those of the suite, or toy ones."""
    if quick:
        shapes = StepShapes(decode_rows=(2,), mixed_rows=(2,), chunk_rows=(4,), chunk=8)
        settings = ServingSettings(
            max_num_seqs=2, max_num_batched_tokens=16, num_pages=16, page_size=8, shapes=shapes
        )
        toy = ModelConfig(**cpu.TOY)
        return LoadSizes(toy, settings, range(4, 16), range(2, 8), 2, (1, 2), 40)
    settings = ServingSettings(
        max_num_seqs=16, max_num_batched_tokens=256, num_pages=600, page_size=16
    )
    config = ModelConfig(**cpu.GEOMETRY)
    return LoadSizes(config, settings, range(32, 257), range(16, 129), 4, (1, 4, 16), 4000)


def measurements(
    *, quick: bool, rounds: int, torch_compile: bool, others: Others = _NOBODY
) -> dict[str, Measure]:
    """The measurements of the suite by name.

    Args:
      quick: toy sizes, whose numbers say only that the measurement works.
      rounds: turns of each contestant.
      torch_compile: not for this suite.
      others: who is measured besides.
    """
    chosen = sizes(quick)
    on_load: dict[str, Measure] = {
        "closed_loops": lambda: measure_closed_loops(chosen, rounds, others),
        "poisson": lambda: measure_poisson(chosen, rounds, others),
    }
    if others.url:
        return on_load
    return on_load | {
        "static_batches": lambda: measure_static_batches(chosen, rounds),
        "first_token": lambda: measure_first_token(chosen, rounds),
    }


def measure_closed_loops(chosen: LoadSizes, rounds: int, others: Others) -> Measurement:
    """Clients that wait for their answers: rows for each number of them."""

    async def run(contestants: Mapping[str, Serve]) -> list[dict[str, Any]]:
        found: dict[tuple[int, str], list[dict[str, float]]] = {}
        for turn, clients in itertools.product(range(rounds), chosen.clients):
            for name, serve in contestants.items():
                asks = _asks(chosen, clients, seed=turn)
                answers = await load.closed_loop(serve, asks, clients)
                found.setdefault((clients, name), []).append(load.figures(answers))
        return [
            {"server": name, "clients": clients} | turns.median_row(rows)
            for (clients, name), rows in found.items()
        ]

    rows = asyncio.run(_with(contestants(chosen, others), run))
    return Measurement(
        "Closed loops: each client sends a request when it has the answer to the one before",
        _setting(chosen, others.url),
        rows,
        _against(rows, "output tokens/s", "throughput, {clients} clients"),
    )


def measure_poisson(chosen: LoadSizes, rounds: int, others: Others) -> Measurement:
    """Arrivals at 70 % of what the first contestant serves in the largest closed loop."""

    async def run(contestants: Mapping[str, Serve]) -> list[dict[str, Any]]:
        asks = _asks(chosen, chosen.clients[-1], seed=0)
        first = next(iter(contestants.values()))
        full = load.figures(await load.closed_loop(first, asks, chosen.clients[-1]))
        rate = 0.7 * full["requests/s"]
        found: dict[str, list[dict[str, float]]] = {}
        for turn in range(rounds):
            for name, serve in contestants.items():
                answers = await load.open_loop(serve, asks, rate, seed=turn)
                found.setdefault(name, []).append(load.figures(answers))
        return [
            {"server": name, "rate": rate} | turns.median_row(rows) for name, rows in found.items()
        ]

    rows = asyncio.run(_with(contestants(chosen, others), run))
    title = "Poisson arrivals at 70 % of the rate of the largest closed loop"
    return Measurement(title, _setting(chosen, others.url), rows)


def measure_static_batches(chosen: LoadSizes, rounds: int) -> Measurement:
    """The engine, whose rows are filled as they end, against batches that run until all end."""
    model, rows = _model(chosen.config), chosen.settings.max_num_seqs
    short, *_, long = chosen.generated
    asks = load.mixed(4 * rows, chosen.prompt, range(short, long + 1))
    # One in four is long, so that most rows of a closed batch wait for a few.
    asks = [ask._replace(max_tokens=short if i % 4 else long) for i, ask in enumerate(asks)]
    prompts = [ask.prompt for ask in asks]
    params = [
        SamplingParams(temperature=0.0, max_tokens=ask.max_tokens, ignore_eos=True) for ask in asks
    ]
    settings = {name: getattr(chosen.settings, name) for name in _SETTINGS}
    llm = LLM(model, enable_prefix_caching=False, **settings)
    llm.warm_up()

    def static() -> None:
        for start in range(0, len(asks), rows):
            part = slice(start, start + rows)
            generate(model, prompts[part], params[part])

    seconds = turns.take_turns(
        {"continuous": lambda: llm.generate(prompts, params), "static": static}, rounds
    )
    tokens = sum(ask.max_tokens for ask in asks)
    gain = seconds["static"] / seconds["continuous"]
    return Measurement(
        f"Continuous against static batches of {rows}, one output in four long",
        _setting(chosen, "") | {"generated": f"{short} or {long}"},
        [
            {"batches": name, "seconds": value, "output tokens/s": tokens / value}
            for name, value in seconds.items()
        ],
        [Target("continuous, times static", gain, ">=", 2)],
    )


def measure_first_token(chosen: LoadSizes, rounds: int) -> Measurement:
    """The time to the first token of a long prompt through our server, by half the prefill."""
    config = chosen.config.replace(num_kv_heads=chosen.config.num_heads)
    asks = load.mixed(rounds + 1, range(chosen.long, chosen.long + 1), range(2, 3))

    async def run(contestants: Mapping[str, Serve]) -> dict[str, list[load.TimedAnswer]]:
        found: dict[str, list[load.TimedAnswer]] = {name: [] for name in contestants}
        for ask in asks:
            for name, serve in contestants.items():
                found[name] += await load.closed_loop(serve, [ask], 1)
        return {name: answers[1:] for name, answers in found.items()}

    layouts = {
        layout: served.over_http(_model(config.replace(layout=layout)), chosen.settings)
        for layout in ("mha", "fusedkv")
    }
    answers = asyncio.run(_with(layouts, run))
    rows = [{"layout": name} | load.figures(own) for name, own in answers.items()]
    whole, half = (row["TTFT p50 ms"] for row in rows)
    return Measurement(
        f"First token of prompts of {chosen.long} tokens, over HTTP",
        _setting(chosen, ""),
        [{name: row[name] for name in ("layout", "TTFT p50 ms", "TTFT p99 ms")} for row in rows],
        [Target("TTFT of fusedkv, of mha's", half / whole, "<=", 0.6)],
    )


def contestants(chosen: LoadSizes, others: Others) -> Contestants:
    """Who is measured: the server at a URL, or our engine, transformers if it is installed, and
    vLLM if it is named, then with our server, as both are asked over HTTP."""
    if others.url:
        return {others.url: served.server(others.url)}
    found: dict[str, contextlib.AbstractAsyncContextManager[Serve]] = {
        OURS: served.engine(_model(chosen.config), chosen.settings)
    }
    if not torch_llama.missing():
        found[THEIRS] = served.transformers(chosen.config, chosen.settings)
    if others.vllm:
        model = _model(chosen.config)
        found[OURS_HTTP] = served.over_http(model, chosen.settings)
        found[VLLM] = served.vllm(others.vllm, model, chosen.settings)
    return found


_SETTINGS = ("max_num_seqs", "max_num_batched_tokens", "num_pages", "page_size", "shapes")


def _model(config: ModelConfig) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(0))


def _asks(chosen: LoadSizes, clients: int, seed: int) -> list[Ask]:
    return load.mixed(chosen.asks * clients, chosen.prompt, chosen.generated, seed)


async def _with(contestants: Contestants, run: Callable[[Mapping[str, Serve]], Any]) -> Any:
    """What `run` gives for contestants that are all there, none of which works unasked."""
    async with contextlib.AsyncExitStack() as stack:
        entered = {name: await stack.enter_async_context(c) for name, c in contestants.items()}
        return await run(entered)


def _against(rows: Sequence[Mapping[str, Any]], column: str, what: str) -> list[Target]:
    """Ours against theirs, in rows that differ in nothing else."""
    ours, theirs = ([row for row in rows if row["server"] == name] for name in (OURS, THEIRS))
    return [
        Target(f"{what.format(**a)}, times transformers", a[column] / b[column], ">=", 1.5)
        for a, b in zip(ours, theirs, strict=False)
    ]


def _setting(chosen: LoadSizes, url: str) -> dict[str, Any]:
    setting: dict[str, Any] = {
        "prompt": f"{chosen.prompt.start} to {chosen.prompt.stop - 1} tokens",
        "generated": f"{chosen.generated.start} to {chosen.generated.stop - 1}",
    }
    if url:
        return setting | {"server": url}
    return setting | {
        "parameters": parameter_count(chosen.config),
        "rows": chosen.settings.max_num_seqs,
        "tokens a step": chosen.settings.max_num_batched_tokens,
    }
