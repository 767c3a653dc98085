"""What the kernel is compiled for, and what its warpgroups share."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # queries of a consumer, the rows of one wgmma
CONSUMERS = 2
BLOCK = CONSUMERS * ROWS
CHUNK = 64  # channels in 128 bytes, the rows that TMA swizzles and wgmma reads
_REGISTERS = 128  # of a thread, where four warpgroups share a multiprocessor's 65,536
# jax 0.10 asks for an index beside the reference, 0.11 deprecates it, 0.12 has none.
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_ASKS_FOR_INDEX = _INDEX is not None and _INDEX.default is inspect.Parameter.empty

Ref = Any  # of Pallas, to shared or global memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernel is compiled for.

    Attributes:
      keys: tokens of a tile, a multiple of 64.
      stages: tiles of keys, and of values, in shared memory; at least 2.
      size: H, of keys and values.
      groups: query heads of a KV head.
      num_keys, num_values: sources.
      mix_keys, mix_values: they have weights.
      absent: keys may be absent, whose values are not to be multiplied, not even by zero.
      causal, window, segments: of the mask; window 0 for none.
      scale: of the scores, positive.
      softcap: of the scores, 0 for none.
      interpret: None on a GPU, else the parameters of Pallas' interpreter.
    """

    keys: int
    stages: int
    size: int
    groups: int
    num_keys: int
    num_values: int
    mix_keys: bool
    mix_values: bool
    absent: bool
    causal: bool
    window: int
    segments: bool
    scale: float
    softcap: float
    interpret: Any = None

    @property
    def consumer_registers(self) -> int:
        """Of a thread; a producer that mixes needs more than one that only loads."""
        return 160 if self.mix_keys or self.mix_values or self.absent else 232

    @property
    def producer_registers(self) -> int:
        """What the consumers leave."""
        return 2 * _REGISTERS - self.consumer_registers

    @property
    def shared(self) -> int:
        """Bytes of shared memory for tiles of queries, keys and values, and for lse."""
        tiles = self.stages * self.keys * (self.num_keys + self.num_values)
        return 2 * self.size * (BLOCK + tiles) + 4 * BLOCK

    def slot(self, n: Array | int) -> Array | int:
        """Where the n-th tile lies in shared memory."""
        return n % self.stages if isinstance(n, int) else lax.rem(n, jnp.int32(self.stages))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """Keys or values.

    Attributes:
      sources: [B, S, K, H] each.
      tiles: of each source, [stages, keys, H] in shared memory; the first is what is attended to.
      weights: float32 [sources, K, H], or None.
      loaded: a barrier for each stage; its tiles have come.
      ready: alike; the first tile is what consumers shall see. `loaded` where nothing is changed.
      used: alike; both consumers have read it.
      absent: rows of absent keys must become zero.
    """

    sources: Sequence[Ref]
    tiles: Sequence[Ref]
    weights: Ref | None
    loaded: Ref
    ready: Ref
    used: Ref
    absent: bool

    @property
    def changed(self) -> bool:
        """The producer writes to the tiles that it has loaded."""
        return self.weights is not None or self.absent


@dataclasses.dataclass(frozen=True)
class Run:
    """The tiles that a block of queries visits, a row of `gpu.bounds.runs`."""

    low: Array
    high: Array
    clear_low: Array
    clear_high: Array

    @property
    def count(self) -> Array:
        """All."""
        return self.high - self.low

    @property
    def clear(self) -> Array:
        """Those of which the block sees everything."""
        return self.clear_high - self.clear_low

    def tile(self, n: Array | int) -> Array:
        """The n-th: the clear ones first, then those around them."""
        rest = self.low + n - self.clear
        rest = rest + jnp.where(rest >= self.clear_low, self.clear, 0)
        return jnp.where(n < self.clear, self.clear_low + n, rest)


def loaded(ref: Ref, layout: Any, *, optimized: bool = False) -> Array:
    """What `ref.at[...]` names in registers; `optimized` refuses slow ways to read it."""
    index = (None,) if _ASKS_FOR_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def widened(x: Array, shape: tuple[int, ...], axis: int, layout: Any) -> Array:
    """x along `axis` of an array of this layout."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [axis]), layout)
