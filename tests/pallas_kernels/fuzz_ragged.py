"""Random steps of ragged attention, against the float64 definition; see `fuzz`."""

import jax
import numpy as np

from tests.pallas_kernels.cases import close
from tests.pallas_kernels.fuzz import Limits, jit
from tests.pallas_kernels.implementation import Implementation
from tests.pallas_kernels.ragged_cases import Step, expected, make


def _counts(rng, most: int) -> np.ndarray:
    """Queries of each row: single tokens and none among chunks of up to `most`."""
    rows = rng.integers(1, 7)
    chunks = np.exp(rng.uniform(0, np.log(most + 1), rows)).astype(int)
    return np.where(rng.random(rows) < 0.5, rng.choice([0, 1, 1, 1], rows), chunks)


def _lengths(rng, counts, page_size: int, keys: int) -> np.ndarray:
    """Tokens of each row: nothing before a chunk, whole pages to the last, or any number."""
    before = rng.integers(0, keys - counts + 1)
    before = np.where(rng.random(len(counts)) < 0.2, 0, before)
    lengths = counts + before
    whole = -(-lengths // page_size) * page_size
    return np.where(rng.random(len(counts)) < 0.2, whole, lengths)


def _lanes(counts) -> tuple[tuple[int, int], ...]:
    """The hint for rows in this order, single tokens first."""
    single = int((counts <= 1).sum())
    lanes = ((single, 1), (len(counts) - single, int(counts.max()) + 1))
    return tuple(x for x in lanes if x[0])


def _step(rng, how: Implementation, limits: Limits) -> Step:
    groups, heads = int(rng.integers(1, 9)), int(rng.integers(1, 5))
    most = min(512, limits.keys, max(1, 16 * limits.rows // (groups * heads)))
    page_size = int(rng.choice([4, 8, 16, 32, 128]))
    counts = _counts(rng, most)
    lanes = ()
    if rng.random() < 0.3:
        counts = np.sort(counts)
        lanes = _lanes(counts)
    formats = [x for x in how.formats if x not in how.unsupported | {"int4"}]
    sizes = rng.choice(limits.sizes, 2)
    options = {
        "window": int(rng.integers(1, limits.keys)),
        "softcap": float(rng.uniform(0.5, 5)),
        "scale": float(rng.uniform(0.02, 0.5)),
    }
    return Step(
        tuple(map(int, counts)),
        tuple(map(int, _lengths(rng, counts, page_size, limits.keys))),
        (groups * heads, heads),
        tuple(map(int, sizes if rng.random() < 0.4 else sizes[[0, 0]])),
        tuple(map(int, rng.integers(1, 4, 2))),
        page_size,
        str(rng.choice(formats)) if rng.random() < 0.4 else "float32",
        shared=int(rng.choice([0, 1, 3])),
        strewn=float(rng.choice([0, 0.3])),
        pad=int(rng.choice([0, 0, 24])),
        lanes=lanes,
        options=tuple(x for x in options.items() if rng.random() < 0.3),
    )


def ragged(rng, how: Implementation, limits: Limits):
    """One step of chunks with single tokens between, over pages that rows share: output and lse."""
    step = _step(rng, how, limits)
    yield f"ragged {step}"
    made = make(step, int(rng.integers(2**31)))

    @jit
    def call(q, keys, values, rows, weights):
        return how.attend_ragged(q, keys, values, rows, *weights, dict(step.options))

    got = call(made.q, made.keys, made.values, made.rows, made.weights)
    jax.tree.map(lambda x, y: close(x, y, how.paged_tolerance), got, expected(step, made))
