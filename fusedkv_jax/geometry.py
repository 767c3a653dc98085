"""The sizes of attention's heads: what a token's streams are, what rotates, what a key costs."""

from __future__ import annotations

from dataclasses import dataclass

from fusedkv_jax.layouts import Kind


@dataclass(frozen=True)
class Geometry:
    """Heads of one attention layer, for separate keys and values and for latents alike.

    Attributes:
        heads: query heads N.
        keys: (heads, channels) of one token's cached key stream.
        values: (heads, channels) of its cached value stream.
        rotary: channels of a cached key that rotate, and of a query.
        products: (channels of a query-key product, of a value) in each head where many queries
            attend.
        single_products: the same where one query attends, which reads latents as they are.
    """

    heads: int
    keys: tuple[int, int]
    values: tuple[int, int]
    rotary: int
    products: tuple[int, int]
    single_products: tuple[int, int]

    @property
    def stream_shapes(self) -> dict[Kind, tuple[int, int]]:
        """(heads, channels) of one token's cached `key` and `value` stream."""
        return {"key": self.keys, "value": self.values}

    def flops_per_key(self, *, single: bool) -> int:
        """FLOPs of one query's two products with one key and value, over all heads."""
        return 2 * self.heads * sum(self.single_products if single else self.products)
