"""A stream of a cache in pages that is read where it lies: the pool of all streams, and a table."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.quantized import Quantized


@dataclasses.dataclass(frozen=True)
class PagedStream:
    """One [B, S, K, H] source whose tokens are spread over the pages of a pool.

    Token i of row b sits in place i % page_size of page `table[b, i // page_size]`. Pages that no
    present token reaches, and their entries in the table, may hold anything.

    All heads of a token lie together: TPUs put the last axis in their lanes, and would turn a pool
    round whose last axis is a head of 64 channels. So do scales, few as they are: those of a page
    fill one axis, a token's heads after another's, and then what fills up lanes.

    Attributes:
      data: [P, pages, page_size, K * H], float or 8-bit codes; or the tokens of a page in tiles,
        [P, pages, page_size / n, n, K * H].
      slot: which of the P streams; an int or an int32 scalar, which may be traced.
      table: int32 [B, W] pages of each row; S = W * page_size.
      head_size: H.
      scale: of 8-bit codes, float [P, pages, G, W], W at least page_size * K / G; else None. G
        groups of heads, which lie on as many devices of a mesh; 1 on one. What fills up lanes is
        finite, whatever it is.
    """

    # Any, as jax also fills trees with tracers, shapes and placeholders.
    data: Any
    slot: Any
    table: Any
    head_size: int
    scale: Any = None

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return math.prod(self.data.shape[2:-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [B, S, K, H] of the source."""
        rows, width = self.table.shape
        heads = self.data.shape[-1] // self.head_size
        return (rows, width * self.page_size, heads, self.head_size)

    @property
    def ndim(self) -> int:
        """Number of the source's axes."""
        return 4

    @property
    def dtype(self) -> Any:
        """Type of the numbers or codes."""
        return self.data.dtype

    def tokens(self, start: Any, size: int) -> Float[Array, "B size K H"] | Quantized:
        """`size` tokens of each row from `start`, which may be traced; both whole pages."""
        step = self.page_size
        pages = lax.dynamic_slice_in_dim(self.table, start // step, size // step, axis=1)

        def gather(pool: Array) -> Array:
            # The slot is an index like the pages: no stream is cut out of the pool.
            return pool.at[self.slot, pages].get(mode="clip")

        rows, heads = pages.shape[0], self.shape[2]
        data = gather(self.data).reshape(rows, size, heads, self.head_size)
        if self.scale is None:
            return data
        groups = self.scale.shape[2]
        scale = gather(self.scale)[..., : step * heads // groups]
        scale = scale.reshape(rows, -1, groups, step, heads // groups).swapaxes(2, 3)
        return Quantized(data, scale.reshape(rows, size, heads, 1))

    def read(self) -> Float[Array, "B S K H"] | Quantized:
        """The tokens of all rows, as one array."""
        return self.tokens(0, self.shape[1])

    def check(self, name: str) -> None:
        """Raises ValueError, naming the argument, where the arrays do not fit each other."""
        wrong = self.data.ndim not in (4, 5) or self.head_size < 1
        if wrong or self.data.shape[-1] % self.head_size or self.table.ndim != 2:
            raise ValueError(
                f"{name}.data has shape {self.data.shape} and {name}.table {self.table.shape}; "
                f"they must be [P, pages, page_size, K * H] with H = {self.head_size}, and [B, W]"
            )
        if self.scale is not None and not self._fits(self.scale.shape):
            lead = ", ".join(map(str, self.data.shape[:2]))
            raise ValueError(
                f"{name}.scale has shape {self.scale.shape}; it must be ({lead}, G, W), of G "
                f"groups of the {self.shape[2]} heads, each with room for {self.page_size} tokens"
            )
        if self.scale is None and not jnp.issubdtype(self.data.dtype, jnp.floating):
            raise ValueError(f"{name}.scale is None; codes of {self.data.dtype} need one")

    def _fits(self, shape: tuple[int, ...]) -> bool:
        """Whether scales may have this shape."""
        if len(shape) != 4 or shape[:2] != self.data.shape[:2] or not shape[2]:
            return False
        heads = self.shape[2]
        return heads % shape[2] == 0 and shape[3] >= self.page_size * heads // shape[2]


jax.tree_util.register_dataclass(PagedStream, ["data", "slot", "table", "scale"], ["head_size"])


def is_paged(sources: Any) -> bool:
    """Whether any source of a tuple lies in pages."""
    return any(isinstance(x, PagedStream) for x in sources)
