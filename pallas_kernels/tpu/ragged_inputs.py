"""What the ragged kernel is given: queries in units of whole tiles, and a list of work.

    unit      rows of queries that fill tiles: `tokens` tokens times the query heads of a part
    part      KV heads whose channels together fill whole lanes; a query is zero off its own head
    work      (row, unit, queries, position, low, high) of each block of at most `units` units

Units are a leading axis, so that a copy may begin at any of them.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import linear
from pallas_kernels.call import RaggedAttentionCall
from pallas_kernels.paged_stream import PagedStream
from pallas_kernels.ragged_rows import RaggedRows
from pallas_kernels.tpu.blocks import LANES, round_up
from pallas_kernels.tpu.how import How
from pallas_kernels.tpu.steps import FAR

_TILE = 16  # rows of a tile of 16-bit numbers
_BLOCK_ROWS = 512  # rows of a block of queries: reading a key then costs less than using it
_BLOCK_BYTES = 24 * 2**20  # of VMEM for a block of queries, its sums and its output
_FIELDS = 6  # numbers of a piece of work


@dataclasses.dataclass(frozen=True)
class RaggedForm:
    """Static sizes of a call.

    Attributes:
      parts: products for each tile of keys.
      together: KV heads of a part.
      heads: query heads of a part.
      rows: rows of a token in a part, `heads` and padding.
      tokens: of a unit.
      units: of a block of queries.
      key_width, value_width: channels of a part.
      num_keys, num_values: sources.
    """

    parts: int
    together: int
    heads: int
    rows: int
    tokens: int
    units: int
    key_width: int
    value_width: int
    num_keys: int
    num_values: int

    @property
    def unit_rows(self) -> int:
        """Rows of a unit."""
        return self.rows * self.tokens

    @classmethod
    def of(cls, call: RaggedAttentionCall, how: How) -> "RaggedForm":
        """The sizes for a call.

        Raises:
          NotImplementedError: the heads of a token do not fill whole lanes.
        """
        keys, values = call.sources[:2]
        total, num, _ = call.q.shape
        heads, size = keys[0].shape[2:]
        value_size = values[0].shape[3]
        fits = (n for n in range(1, heads + 1) if heads % n == 0)
        fits = (n for n in fits if n * size % LANES == 0 and n * value_size % LANES == 0)
        together = next(fits, heads if how.interpret else None)
        if together is None:
            raise NotImplementedError(
                f"pages are read in place where the {heads} heads of a token fill a multiple of "
                f"{LANES} channels; these have {heads * size} and {heads * value_size}"
            )
        parts, each = heads // together, together * num // heads
        rows = 1 << (each - 1).bit_length() if each < _TILE else round_up(each, _TILE)
        tokens = max(1, _TILE // rows)
        widths = together * size, together * value_size
        row_bytes = 4 * (len(keys) * widths[0] + len(values) * widths[1]) + 2 * widths[1] + 1024
        most = min(_BLOCK_ROWS, _BLOCK_BYTES // (parts * row_bytes)) // (rows * tokens)
        units = max(1, min(most, -(-total // tokens)))
        return cls(parts, together, each, rows, tokens, units, *widths, len(keys), len(values))


class RaggedWork(NamedTuple):
    """The list of work, for a kernel with a step for each.

    Attributes:
      numbers: int32 [I * 6], see `field`.
      bounds: int32 [cores + 1], the first piece of each core; last, how many are to be done.
      units: int32 [R], the first unit of each row.
    """

    numbers: Array
    bounds: Array
    units: Array


FIELDS = ("row", "unit", "queries", "position", "low", "high")


def work_list(call: RaggedAttentionCall, form: RaggedForm, tokens: int, cores: int) -> RaggedWork:
    """Blocks of queries, row after row; their keys are those from `low` to before `high`.

    Args:
      tokens: of a block of keys.
      cores: that share the list.
    """
    rows, keys = call.rows, call.sources.keys[0]
    blocks = rows.blocks(call.q.shape[0], form.units * form.tokens)
    each = -(-rows.counts // form.tokens)
    units = jnp.cumsum(each, dtype=jnp.int32) - each
    index = jnp.arange(blocks.rows.shape[0], dtype=jnp.int32)
    unit = units[blocks.rows] + (index - blocks.firsts[blocks.rows]) * form.units
    high = jnp.clip(blocks.positions + blocks.counts, 0, keys.shape[1])
    low = jnp.zeros_like(high)
    if call.window is not None:
        low = jnp.clip(blocks.positions - call.window + 1, 0, high)
    fields = (blocks.rows, unit, blocks.counts, blocks.positions, low, high)
    numbers = jnp.stack(fields, axis=1).astype(jnp.int32)
    products = (-(-high // tokens) - low // tokens) * jnp.where(
        blocks.counts <= form.tokens, 1, form.units
    )
    bounds = bounds_of(jnp.maximum(products, 1), blocks.firsts[-1], cores)
    return RaggedWork(numbers.reshape(-1), bounds, units)


def bounds_of(costs: Array, count: Array, cores: int) -> Array:
    """The first of each core's part of `count` pieces: parts that cost about the same."""
    used = jnp.arange(costs.shape[0], dtype=jnp.int32) < count
    costs = jnp.where(used, costs, 0)
    ends = jnp.cumsum(costs, dtype=jnp.int32)
    # Which core's share the middle of a piece lies in.
    core = (2 * ends - costs) * cores // jnp.maximum(2 * ends[-1], 1)
    before = used & (core < jnp.arange(cores + 1, dtype=jnp.int32)[:, None])
    return before.sum(1, dtype=jnp.int32)


def places(rows: RaggedRows, units: Array, total: int, form: RaggedForm) -> tuple[Array, Array]:
    """Place in units of each query, [T], -1 for none; and the query of each place in units."""
    row, index = rows.owners(total)
    place = jnp.where(row < 0, -1, units[row] * form.tokens + index)
    # Units of all rows, and those that a block at the end reads beyond them.
    count = total // form.tokens + rows.counts.shape[0] + form.units
    query = jnp.full(count * form.tokens, total, jnp.int32)
    query = query.at[jnp.where(place < 0, query.shape[0], place)].set(
        jnp.arange(total, dtype=jnp.int32), mode="drop"
    )
    return place, query


def in_units(call: RaggedAttentionCall, form: RaggedForm, factor: float, query: Array) -> Array:
    """Queries [units, parts, J, unit rows, key width], times `factor` and the weights."""
    folded = linear.fold_queries(call.q[None], call.sources.key_weights, factor)[0]  # [J, T, N, H]
    folded = folded.astype(call.q.dtype)
    num, size = form.num_keys, folded.shape[3]
    gathered = folded.at[:, query].get(mode="fill", fill_value=0)
    grouped = gathered.reshape(
        num, -1, form.tokens, form.parts, form.together, form.heads // form.together, 1, size
    )
    if form.together > 1:
        own = np.eye(form.together, dtype=bool)[:, None, :, None]
        grouped = jnp.where(own, grouped, jnp.zeros_like(grouped))
    wide = grouped.reshape(num, -1, form.tokens, form.parts, form.heads, form.key_width)
    wide = jnp.pad(wide, ((0, 0),) * 4 + ((0, form.rows - form.heads), (0, 0)))
    wide = wide.transpose(1, 3, 0, 2, 4, 5)
    return wide.reshape(-1, form.parts, num, form.unit_rows, form.key_width)


def from_units(found: Array, place: Array, form: RaggedForm) -> Array:
    """[units, parts, unit rows, width] of a result as [T, N, width / together]; 0 for no query."""
    width = found.shape[3]
    found = found.reshape(-1, form.parts, form.tokens, form.rows, width)[:, :, :, : form.heads]
    found = found.transpose(0, 2, 1, 3, 4).reshape(-1, form.parts, form.heads, width)
    found = jnp.where((place >= 0)[:, None, None, None], found[jnp.maximum(place, 0)], 0)
    together = form.together
    found = found.reshape(
        -1, form.parts, together, form.heads // together, together, width // together
    )
    own = [found[:, :, head, :, head] for head in range(together)]
    return jnp.stack(own, axis=2).reshape(place.shape[0], -1, width // together)


def lse_from_units(found: Array, place: Array, form: RaggedForm) -> Array:
    """[units, parts, unit rows] as [T, N]; -inf for no query."""
    found = found.reshape(-1, form.parts, form.tokens, form.rows)[..., : form.heads]
    found = found.transpose(0, 2, 1, 3).reshape(-1, form.parts * form.heads)
    return jnp.where((place >= 0)[:, None], found[jnp.maximum(place, 0)], -jnp.inf)


def output_weights(weights: Array | None, form: RaggedForm) -> Array:
    """Weights of the values as [J', parts, 1, value width]; ones where there are none."""
    if weights is None:
        return jnp.ones((1, form.parts, 1, form.value_width), jnp.float32)
    wide = weights.astype(jnp.float32)
    return wide.reshape(form.num_values, form.parts, 1, form.value_width)


def tokens_of_rows(form: RaggedForm) -> np.ndarray:
    """Which token of a block each row of it belongs to, int32 [rows, lanes]."""
    token = np.arange(form.units * form.unit_rows) // form.rows
    return np.broadcast_to(token[:, None], (token.size, LANES)).astype(np.int32)


def scales(stream: PagedStream) -> Array:
    """Scales of a pool, [P, pages, 1, lanes]: as they lie there, if that is whole lanes."""
    found = stream.scale.astype(jnp.float32)
    return jnp.pad(found, ((0, 0),) * 3 + ((0, -found.shape[3] % LANES),))


def scale_places(
    call: RaggedAttentionCall, form: RaggedForm, tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of 8-bit pages, else a few zeros: what puts scales and heads where they are used.

    Returns:
      float32 [K, lanes, LANES], 1 from head k's scale of a token, of so many tokens, to the lanes
      of such tokens; int32 [1, lanes], the token of each scale, or FAR; and [rows of a block, heads
      of a part], 1 where a row belongs to a head.
    """
    stream = call.sources.keys[0]
    if stream.scale is None:
        none = np.zeros((1, LANES), np.float32)
        return none[None], none.astype(np.int32), none
    heads = stream.shape[2]
    lane = np.arange(round_up(heads * tokens, LANES))
    token = np.arange(LANES) % tokens
    places = lane[:, None] == token * heads + np.arange(heads)[:, None, None]
    row = np.arange(form.units * form.unit_rows) % form.rows
    owners = row[:, None] // (form.heads // form.together) == np.arange(form.together)
    # What fills up lanes belongs to no token: memory there is as unwritten as that of absent pages.
    token = np.where(lane < heads * tokens, lane // heads, FAR)[None].astype(np.int32)
    return places.astype(np.float32), token, owners.astype(np.float32)
