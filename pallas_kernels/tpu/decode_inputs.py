"""What decoding from either form of a cache needs: which blocks to visit, and its limits."""

from collections.abc import Iterable

import jax.numpy as jnp
from jax import Array

from pallas_kernels.masks import Mask
from pallas_kernels.tpu import steps as steps_lib
from pallas_kernels.tpu.blocks import LANES
from pallas_kernels.tpu.how import Interpret

BLOCK_BYTES = 4 * 2**20  # of a block: some microseconds of copying, against the cost of a step
MAX_ROWS = 256  # query rows of one product; more of them are not a decoding step


def visited_blocks(rule: Mask, q_positions: Array, k_positions: Array, block: int) -> Array:
    """bool [B, blocks] of tiles that may hold something visible."""
    where = steps_lib.BlockedPlaces(q_positions, k_positions, None, None, False)
    visited, _ = steps_lib.tables(rule, where, q_positions.shape[1], block)
    return jnp.asarray(visited[:, 0])


def check_lanes(widths: Iterable[int], what: str, interpret: Interpret) -> None:
    """Refuses a cache that the compiler would copy at every step.

    It lays out arrays with a narrow last axis with another one in the lanes, and turns them
    round for a kernel.
    """
    narrow = [width for width in widths if width % LANES]
    if narrow and not interpret:
        raise NotImplementedError(
            f"decoding reads {what} of a multiple of {LANES} channels in place; these have "
            f"{narrow[0]}"
        )
