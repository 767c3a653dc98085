"""Attention timed on the device, against ceilings that the same run measures."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

import pallas_kernels
from experiments.benchmarks.report import Measurement, Target
from experiments.benchmarks.turns import take_turns
from pallas_kernels import Pages, choice, quantize

# Implementations that compete, by platform.
CONTESTANTS = {
    "gpu": ("auto", "triton", "cudnn", "folded", "xla"),
    "tpu": ("auto", "tpu", "folded", "xla"),
    "cpu": ("auto", "xla"),
}
HOPPER = ("mosaic_gpu", "triton", "cudnn")  # apart: no GPU has run the first


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes of a call: queries and keys are tokens of a row, size is the head size."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    size: int

    @property
    def causal_flops(self) -> float:
        """FLOPs of both products for the visible pairs."""
        hidden = self.queries * (self.queries - 1) / 2
        pairs = self.queries * self.keys - hidden
        return 4 * self.batch * self.heads * self.size * pairs

    def draw(
        self, sources: int, dtype: DTypeLike = jnp.bfloat16
    ) -> tuple[
        jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...], jax.Array | None, jax.Array | None
    ]:
        """Normal queries, keys, values, and weights, None for one source."""
        keys = jax.random.split(jax.random.key(0), 2 * sources + 3)
        normal = jax.random.normal
        lead = (self.batch, self.keys, self.kv_heads, self.size)
        q = normal(keys[0], (self.batch, self.queries, self.heads, self.size), dtype)
        streams = [normal(key, lead, dtype) for key in keys[3:]]
        a, b = (normal(key, (sources, *lead[2:])) for key in keys[1:3])
        sides = tuple(streams[:sources]), tuple(streams[sources:])
        return (q, *sides, None, None) if sources == 1 else (q, *sides, a, b)


def repeated(function: Callable, count: int) -> Callable:
    """`function(q, *rest)` `count` times in one program, each time on the last result.

    One launch from Python covers all of them. Queries and weights depend on the last result, so
    that the compiler neither merges the calls nor mixes the sources once for all of them.
    """

    def vary(x: jax.Array, one: jax.Array) -> jax.Array:
        return x * one if getattr(x, "ndim", 0) == 3 else x  # weights [J, K, H]

    @jax.jit
    def run(q: jax.Array, *rest: jax.Array) -> jax.Array:
        def step(_: jax.Array, q: jax.Array) -> jax.Array:
            one = 1 + 1e-6 * q.reshape(-1)[0].astype(jnp.float32)
            out = function(q, *(vary(x, one) for x in rest))
            return q + (1e-6 * out.astype(jnp.float32)).astype(q.dtype)

        return lax.fori_loop(0, count, step, q)

    return run


def seconds(
    contestants: dict[str, tuple[Callable, tuple]], count: int, rounds: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of one execution of each contestant, and why the others take no part."""
    ready, refused = {}, {}
    for name, (function, arguments) in contestants.items():
        run = repeated(function, count)
        try:
            jax.block_until_ready(run(*arguments))
        except (NotImplementedError, jax.errors.JaxRuntimeError) as reason:
            refused[name] = str(reason).splitlines()[0]
            continue
        ready[name] = functools.partial(
            lambda run, arguments: jax.block_until_ready(run(*arguments)), run, arguments
        )
    return {name: x / count for name, x in take_turns(ready, rounds).items()}, refused


@functools.cache
def ceilings(quick: bool, rounds: int) -> dict[str, float]:
    """Bytes a second of a copy (read and written), FLOP/s of a large bfloat16 product."""
    size, side = (2**16, 64) if quick else (2**29, 8192)
    block = jnp.ones((size,), jnp.bfloat16)
    square = jnp.full((side, side), 1 / side, jnp.bfloat16)
    contestants = {
        "copy": (lambda x: x, (block,)),
        "product": (lambda x, y: x @ y, (square, square)),
    }
    found, _ = seconds(contestants, 2 if quick else 20, rounds)
    return {
        "copy bytes/s": 2 * block.nbytes / found["copy"],
        "product FLOP/s": 2 * side**3 / found["product"],
    }


def gradients(function: Callable) -> Callable:
    """A step of training: the sum of all gradients in the shape of q, so that none is dropped."""

    def step(q: jax.Array, *rest: jax.Array) -> jax.Array:
        leaves = jax.grad(lambda *x: function(*x).astype(jnp.float32).sum(), range(len(rest) + 1))
        dq, *others = jax.tree.leaves(leaves(q, *rest))
        return dq + jnp.stack([x.astype(jnp.float32).mean() for x in others]).sum().astype(dq.dtype)

    return step


def measure_sequence(
    shape: AttentionShape, names: Sequence[str], *, gradient: bool, quick: bool, rounds: int
) -> Measurement:
    """Prefill, or a training step, of plain and rebuilt layers."""
    plain, fused = shape.draw(1), shape.draw(2)
    contestants = {}
    for kind, arguments in (("plain", plain), ("rebuilt", fused)):
        arguments = tuple(x for x in arguments if x is not None)
        for name in names:
            call = functools.partial(pallas_kernels.attention, implementation=name)
            call = gradients(call) if gradient else call
            contestants[f"{kind}, {name}"] = (call, arguments)
    found, refused = seconds(contestants, 2 if quick else 10, rounds)
    limits = ceilings(quick, rounds)
    flops = shape.causal_flops * (3.5 if gradient else 1)
    rows = [
        {
            "contestant": name,
            "ms": 1e3 * time,
            "TFLOP/s": flops / time / 1e12,
            "of a product's": flops / time / limits["product FLOP/s"],
        }
        for name, time in found.items()
    ]
    title = "Training: forward and backward" if gradient else "Prefill: causal forward"
    return Measurement(
        f"{title}, bfloat16, two sources where rebuilt",
        dataclasses.asdict(shape) | limits | {f"no {k}": v for k, v in refused.items()},
        rows,
        _targets(found, gradient),
    )


def _targets(found: dict[str, float], gradient: bool) -> list[Target]:
    targets = []
    for kind in ("plain", "rebuilt"):
        others = {k: v for k, v in found.items() if k.startswith(kind)}
        own = others.pop(f"{kind}, auto", None)
        if own and others:
            ratio = own / min(others.values())
            targets.append(Target(f"{kind}: auto, of the best's time", ratio, "<=", 1.05))
    for name in ("triton", "mosaic_gpu"):
        times = [found.get(f"{kind}, {name}") for kind in ("plain", "rebuilt")]
        if times[0] and times[1] and not gradient:
            ratio = times[0] / times[1]
            targets.append(Target(f"{name}: rebuilt, of the plain one's speed", ratio, ">=", 0.7))
    return targets


def measure_decode(
    shape: AttentionShape, names: Sequence[str], *, quick: bool, rounds: int
) -> Measurement:
    """One token for each row: own against rebuilt, 16 against 8 bits, rows against pages."""
    lengths = jnp.full((shape.batch,), shape.keys, jnp.int32)
    contestants, sizes = {}, {}
    for kind, count in (("own", 1), ("rebuilt", 2)):
        q, keys, values, *weights = shape.draw(count)
        stored: dict[str, Any] = {"bf16": (keys, values)}
        stored["int8"] = tuple(tuple(quantize(x) for x in side) for side in (keys, values))
        weights = [w for w in weights if w is not None]
        for storage, sides in stored.items():
            for name in names:
                call = functools.partial(
                    pallas_kernels.attention, kv_lengths=lengths, implementation=name
                )
                key = f"{kind} {storage}, {name}"
                contestants[key] = (call, (q, *sides, *weights))
                sizes[key] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(sides))
        key = f"{kind} bf16 pages, auto"
        pages, table = _paged(shape, keys, values, 16 if quick else 64)
        call = functools.partial(_attend_pages, implementation="auto")
        contestants[key] = (call, (q, pages, table, lengths, *weights))
        sizes[key] = pages.nbytes
    found, refused = seconds(contestants, 2 if quick else 20, rounds)
    limits = ceilings(quick, rounds)
    rows = [
        {
            "contestant": name,
            "us": 1e6 * time,
            "GB/s": sizes[name] / time / 1e9,
            "of a copy's": sizes[name] / time / limits["copy bytes/s"],
        }
        for name, time in found.items()
    ]
    shares = {row["contestant"]: row["of a copy's"] for row in rows}
    targets = [
        Target(f"{kind}: share of the copy's bandwidth", shares[f"{kind}, auto"], ">=", 0.8)
        for kind in ("own bf16", "rebuilt bf16")
    ]
    ratio = found["rebuilt int8, auto"] / found["own bf16, auto"]
    targets.append(Target("rebuilt int8, of the time of own bf16", ratio, "<=", 1.05))
    return Measurement(
        "Decode: one token a row",
        dataclasses.asdict(shape)
        | limits
        | {"device chosen for": " ".join(choice.device())}
        | {f"no {k}": v for k, v in refused.items()},
        rows,
        targets,
    )


def _attend_pages(
    q: jax.Array,
    pages: Pages,
    table: jax.Array,
    lengths: jax.Array,
    *weights: jax.Array | None,
    implementation: str,
) -> jax.Array:
    return pallas_kernels.paged_attention(
        q, pages, table, lengths, *weights, implementation=implementation
    )


def _paged(
    shape: AttentionShape, keys: Sequence[jax.Array], values: Sequence[jax.Array], page_size: int
) -> tuple[Pages, jax.Array]:
    """The same tokens in shuffled pages."""
    count = shape.keys // page_size
    pages = Pages.create(
        num_pages=shape.batch * count, page_size=page_size, num_kv_heads=shape.kv_heads,
        num_keys=len(keys), num_values=len(values), key_size=shape.size, value_size=shape.size,
    )  # fmt: skip
    order = jax.random.permutation(jax.random.key(1), pages.num_pages)
    table = order.reshape(shape.batch, count).astype(jnp.int32)
    at = jnp.broadcast_to(jnp.arange(shape.keys), (shape.batch, shape.keys))
    return jax.jit(Pages.write)(pages, keys, values, table, at), table
