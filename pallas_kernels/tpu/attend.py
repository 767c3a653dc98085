"""The differentiable call: arrays in the kernels' order, one `custom_vjp` for every kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import linear
from pallas_kernels.masks import Mask
from pallas_kernels.tpu import steps as steps_lib
from pallas_kernels.tpu import tile, tile_backward
from pallas_kernels.tpu.blocks import Blocks
from pallas_kernels.tpu.chips import Chip


@dataclasses.dataclass(frozen=True)
class How:
    """Static settings of a call.

    Attributes:
      scale, softcap: of the scores.
      chip: what is compiled for.
      full, partial: there may be tiles without, and with, hidden scores.
      per_row: rows of the batch visit different tiles.
      holes: some keys of the arrays may be absent.
    """

    scale: float
    softcap: float | None
    chip: Chip
    full: bool = True
    partial: bool = True
    per_row: bool = False
    holes: bool = False

    @property
    def query_factor(self) -> float:
        """What the queries are multiplied with: base 2, unless a soft cap comes in between."""
        return self.scale * (tile.LOG2E if self.softcap is None else 1.0)

    def specialized(self, visited, full, holes: bool = False) -> "How":
        """The settings for these tables of tiles."""
        known = isinstance(visited, np.ndarray)
        return dataclasses.replace(
            self,
            per_row=visited.shape[0] > 1,
            full=bool(full.any()) if known else True,
            partial=bool((visited & ~full).any()) if known else True,
            holes=holes,
        )


def stack(x, heads: int, block: int, fill: float = 0.0):
    """[B, T, N, H] to [B, K, blocks, G * block, H]: the heads of a group, then the tokens."""
    batch, length, num, size = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)), constant_values=fill)
    x = x.reshape(batch, -1, block, heads, num // heads, size).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(*x.shape[:3], -1, size)


def unstack(x, block: int, length: int):
    """The inverse of `stack`."""
    batch, heads, count, rows, size = x.shape
    x = x.reshape(batch, heads, count, rows // block, block, size).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, count * block, -1, size)[:, :length]


def scaled(q, how: How):
    """Queries times their factor, rounded once."""
    return (q.astype(jnp.float32) * how.query_factor).astype(q.dtype)


def kernel_order(q, sources):
    """Sources as [B, K, S, H] in the dtype of q, weights as [K, J, H] fp32."""
    keys, values, *weights = sources
    sides = [tuple(x.astype(q.dtype).transpose(0, 2, 1, 3) for x in y) for y in (keys, values)]
    flip = lambda x: None if x is None else x.astype(jnp.float32).transpose(1, 0, 2)  # noqa: E731
    return *sides, *map(flip, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def tiled(how: How, both: tuple[Blocks, Blocks], interpret, q, sources, mask: Mask):
    """(out, lse) by the tile kernel; arguments as of `reference.attention`."""
    return _forward(how, both, interpret, q, sources, mask)[0]


def _forward(how: How, both, interpret, q, sources, mask: Mask):
    blocks, (_, length, _, _), keys = both[0], q.shape, sources[0][0]
    heads = keys.shape[2]
    where = steps_lib.places(mask, length, keys.shape[1], blocks.queries, blocks.keys)
    rule = Mask(causal=mask.causal, window=mask.window)
    out, lse = tile.forward(
        how, rule, blocks, stack(scaled(q, how), heads, blocks.queries),
        kernel_order(q, sources), where, interpret,
    )  # fmt: skip
    out = unstack(out, blocks.queries, length)
    lse = unstack(lse.swapaxes(3, 4), blocks.queries, length)[..., 0]
    return (out, lse), (q, sources, mask, out, lse)


def _backward(how: How, both, interpret, residuals, cotangents):
    return (*gradients(how, both[1], interpret, residuals, cotangents), None)


tiled.defvjp(_forward, _backward)


def gradients(how: How, blocks, interpret, residuals, cotangents):
    """Gradients of the queries and of the sources, by the tile kernel."""
    q, sources, mask, out, lse = residuals
    length, keys = q.shape[1], sources[0][0]
    heads = keys.shape[2]
    dout, lse, delta = linear.statistics(out, lse, cotangents, tile_backward.BLIND)
    where = steps_lib.places(mask, length, keys.shape[1], blocks.queries, blocks.keys)
    rule = Mask(causal=mask.causal, window=mask.window)
    stacked = functools.partial(stack, heads=heads, block=blocks.queries)
    arrays = {
        "q": stacked(scaled(q, how)),
        "dout": stacked(dout.astype(q.dtype)),
        "lse": stacked(lse[..., None] * tile.LOG2E, fill=tile_backward.BLIND).swapaxes(3, 4),
        "delta": stacked(delta[..., None]).swapaxes(3, 4),
    }
    dq, dkey, dvalue = tile_backward.backward(
        how, rule, blocks, arrays, kernel_order(q, sources), where, interpret
    )
    dkey = dkey * (how.scale / how.query_factor)
    present = None
    if mask.ragged:  # an absent source may hold NaN
        present = (where.k_positions < steps_lib.FAR)[:, : keys.shape[1], None, None]
    dkeys, dkey_weights = linear.unmix(dkey.transpose(0, 2, 1, 3), sources[0], sources[2], present)
    dvalues, dvalue_weights = linear.unmix(
        dvalue.transpose(0, 2, 1, 3), sources[1], sources[3], present
    )
    return unstack(dq, blocks.queries, length), (dkeys, dvalues, dkey_weights, dvalue_weights)
