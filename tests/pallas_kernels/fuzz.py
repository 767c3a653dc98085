"""Random calls of the attention operation against the float64 definition, new ones every week.

Each case is one program, as users compile it, with XLA's optimizations: forward, lse and gradients.
"""

import dataclasses
import datetime
import functools
import os
import traceback
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Pages, Stacked, quantize
from tests.oracles import attention as oracle
from tests.pallas_kernels.cases import I32, close, poison
from tests.pallas_kernels.implementation import Implementation
from tests.pallas_kernels.stored_cases import EIGHT_AND_EIGHT, KIVI, spoil
from tests.plain_code import FAST

# As users compile it: the tests may ask XLA for plain code (`tests.plain_code`).
jit = functools.partial(jax.jit, compiler_options=FAST)

SIZES = (8, 16, 24, 32, 64, 80, 96, 128)


def seed() -> str:
    """FUSEDKV_FUZZ_SEED, by default the ISO year and week."""
    year, week, _ = datetime.date.today().isocalendar()
    return os.environ.get("FUSEDKV_FUZZ_SEED", f"{year}-W{week:02}")


def count() -> int:
    """FUSEDKV_FUZZ_CASES, by default 60: cases of one run, over all implementations."""
    return int(os.environ.get("FUSEDKV_FUZZ_CASES", "60"))


def share(parts: int) -> range:
    """The cases of an implementation that gets so many of 200 parts; one at least."""
    return range(max(1, parts * count() // 200))


@dataclasses.dataclass(frozen=True)
class Limits:
    """How large a case may be: the definition loops over query rows, interpreters over tiles.

    Attributes:
      rows: B * T * N.
      numbers: of one source.
      sizes: head sizes.
      keys: S.
    """

    rows: int = 600
    numbers: int = 2**19
    sizes: tuple[int, ...] = SIZES
    keys: int = 640


def _shape(rng, limits: Limits, value_size: bool):
    """(B, T, S, N, K, H, H', J, J'); half the cases are a few queries against many keys."""
    while True:
        batch, heads, groups = rng.integers(1, 4), rng.integers(1, 9), rng.integers(1, 5)
        few = rng.random() < 0.5
        length = rng.integers(1, 4) if few else rng.integers(1, 41)
        keys = rng.choice([rng.integers(1, 65), rng.integers(65, 641), 512]) if few else (
            rng.choice([length, rng.integers(1, 65)])
        )  # fmt: skip
        size, other = rng.choice(limits.sizes, 2)
        other = other if value_size and rng.random() < 0.4 else size
        shape = (batch, length, keys, heads * groups, heads, size, other, *rng.integers(1, 4, 2))
        small = batch * length * heads * groups <= limits.rows and keys <= limits.keys
        if small and batch * keys * heads * max(size, other) <= limits.numbers:
            return tuple(map(int, shape))


def _options(rng, shape, unsupported):
    batch, length, keys = shape[:3]
    may = lambda word, chance: word not in unsupported and rng.random() < chance  # noqa: E731
    options = {"causal": not may("full", 0.2)}
    if may("window", 0.3):
        options["window"] = int(rng.integers(1, keys + 5))
    if may("softcap", 0.25):
        options["softcap"] = float(rng.uniform(0.5, 5))
    if may("scale", 0.2):
        options["scale"] = float(rng.uniform(0.02, 0.5))
    if may("lengths", 0.4):
        ends = rng.choice([0, keys, -1], batch, p=[0.2, 0.3, 0.5])
        options["kv_lengths"] = I32(np.where(ends < 0, rng.integers(0, keys + 1, batch), ends))
    if may("segments", 0.25):
        ids = lambda n: I32(np.sort(rng.integers(-1, 3, (batch, n)), axis=1))  # noqa: E731
        options |= {"q_segment_ids": ids(length), "kv_segment_ids": ids(keys)}
    if may("positions", 0.25):
        options["q_positions"] = I32(np.sort(rng.integers(0, keys + 20, (batch, length)), axis=1))
    if may("ring", 0.2):
        turned = [
            np.roll(np.arange(keys) + rng.integers(0, 9), rng.integers(keys)) for _ in range(batch)
        ]
        options["kv_positions"] = I32(np.where(rng.random((batch, keys)) < 0.1, -1, turned))
    return options


def _arguments(rng, shape):
    batch, length, keys, heads, kv_heads, size, value_size, num_k, num_v = shape
    normal = lambda *s: rng.normal(size=s).astype(np.float32)  # noqa: E731
    scaled = rng.random(2) < 0.2  # one source may have weights too
    arguments = (
        normal(batch, length, heads, size),
        tuple(normal(batch, keys, kv_heads, size) for _ in range(num_k)),
        tuple(normal(batch, keys, kv_heads, value_size) for _ in range(num_v)),
        normal(num_k, kv_heads, size) if num_k > 1 or scaled[0] else None,
        normal(num_v, kv_heads, value_size) if num_v > 1 or scaled[1] else None,
    )
    return arguments, (normal(batch, length, heads, value_size), normal(batch, length, heads))


def _laid(lies, arguments):
    """The arguments with their sources as they lie in a cache."""
    if lies == "apart":
        return arguments

    def stacked(sources):
        data = jnp.stack(sources)
        size = data.shape[-1]
        if lies != "stacked":
            data = data.reshape(*data.shape[:3], -1)
        return tuple(Stacked(data, slot, size) for slot in range(len(sources)))

    q, keys, values, *weights = arguments
    return q, stacked(keys), stacked(values), *weights


def attention(rng, how: Implementation, limits: Limits):
    """One call with float sources: output, lse and gradients."""
    shape = _shape(rng, limits, "value_size" not in how.unsupported)
    options = _options(rng, shape, how.unsupported)
    lies = str(rng.choice(["apart", "apart", "stacked", "stacked, heads together"]))
    lies = lies if getattr(how, "implementation", None) == "xla" else "apart"
    yield f"attention {shape} {options}, sources {lies}"
    arguments, (dout, dlse) = _arguments(rng, shape)
    dlse = dlse * ("residuals" not in how.unsupported)
    want = oracle.attention(*arguments, options, dout, dlse)

    def both(arguments, cotangents):
        result, pull = jax.vjp(lambda *x: how.attend(_laid(lies, x), options), *arguments)
        return *result, pull(cotangents)

    got = jit(both)(poison(arguments, options), (dout, dlse))
    kept = slice(None) if "residuals" not in how.unsupported else slice(None, None, 2)
    jax.tree.map(lambda x, y: close(x, y, how.tolerance), got[kept], want[kept])


def quantized(rng, how: Implementation, limits: Limits):
    """One call with sources in 8 or 4 bits: output and lse."""
    batch, length, keys, *rest = _shape(rng, limits, "value_size" not in how.unsupported)
    shape = (batch, length, -(-keys // 8) * 8, *rest)
    options = _options(rng, shape, how.unsupported)
    format = str(rng.choice([x for x in how.formats if x not in how.unsupported]))
    yield f"quantized {format} {shape} {options}"
    (q, *sides, key_weights, value_weights), _ = _arguments(rng, shape)
    groups = KIVI if format == "int4" else EIGHT_AND_EIGHT

    @jit  # one small program instead of one for each operation
    def store(sides):
        stored = [
            tuple(quantize(x, format, **group) for x in side)
            for side, group in zip(sides, groups, strict=True)
        ]
        return stored, [[x.dequantize() for x in side] for side in stored]

    stored, exact = store(sides)
    want = oracle.attention(q, *exact, key_weights, value_weights, options)
    spoiled = [tuple(spoil(x, options) for x in side) for side in stored]
    weights = (key_weights, value_weights)
    got = jit(lambda *x: how.attend(x, options))(q, *spoiled, *weights)
    jax.tree.map(lambda x, y: close(x, y, how.quantized_tolerance), got, want)


def paged(rng, how: Implementation, limits: Limits):
    """One call over shuffled pages that hold NaN wherever no token is: output and lse."""
    batch, length, keys, *rest = _shape(rng, limits, "value_size" not in how.unsupported)
    size = int(rng.choice([4, 8, 16, 32]))
    per_row = -(-keys // size)
    shape = (batch, length, per_row * size, *rest)
    options = _options(rng, shape, how.unsupported | {"full", "segments", "positions", "ring"})
    lengths = options.setdefault("kv_lengths", I32(rng.integers(0, shape[2] + 1, batch)))
    options.pop("causal")
    dtype = str(rng.choice(["float32", "float32", "int8"]))
    yield f"paged {dtype} {size} {shape} {options}"
    (q, *sides, key_weights, value_weights), _ = _arguments(rng, shape)
    pages = Pages.create(
        num_pages=batch * per_row + 3, page_size=size, num_kv_heads=shape[4], num_keys=shape[7],
        num_values=shape[8], key_size=shape[5], value_size=shape[6], dtype=dtype,
    )  # fmt: skip
    nan = lambda x: x if x is None or x.dtype == jnp.int8 else jnp.full_like(x, jnp.nan)  # noqa: E731
    pages = dataclasses.replace(pages, data=nan(pages.data), scales=nan(pages.scales))
    table = rng.permutation(pages.num_pages)[: batch * per_row].reshape(batch, per_row)
    at = np.where(np.arange(shape[2]) < lengths[:, None], np.arange(shape[2]), -1)
    named = {"window": None, "softcap": None, "scale": shape[5] ** -0.5, **options}
    named.pop("kv_lengths")

    @jit
    def both(q, pages, sides, places, lengths, weights):
        pages = pages.write(*sides, *places)
        if dtype == "int8":
            sides = jax.tree.map(lambda x: quantize(x, dtype).dequantize(), sides)
        return how.attend_pages(q, pages, places[0], lengths, *weights, named), sides

    weights = (key_weights, value_weights)
    got, sides = both(q, pages, sides, (I32(table), I32(at)), lengths, weights)
    want = oracle.attention(q, *sides, *weights, options)
    jax.tree.map(lambda x, y: close(x, y, how.paged_tolerance), got, want)


def run(form, how: Implementation, limits: Limits, cases) -> None:
    """Runs the cases of these numbers; all that fail are told together.

    A call that the implementation refuses (NotImplementedError) is for another to serve; one that
    refuses most of many calls fails too.
    """
    failed, refused = [], 0
    for number in cases:
        rng = np.random.default_rng([zlib.crc32(seed().encode()), number])
        case = form(rng, how, limits)
        described = next(case)
        try:
            next(case, None)
        except NotImplementedError:
            refused += 1
        except Exception:
            failed.append(f"case {number}: {described}\n{traceback.format_exc(limit=-1)}")
    again = f"FUSEDKV_FUZZ_SEED={seed()}"
    assert not failed, f"{again}\n" + "\n".join(failed)
    assert len(cases) < 20 or refused <= len(cases) // 2, (
        f"{again}: {refused} of {len(cases)} calls were refused"
    )
