"""One call of the operation, checked, as every implementation gets it."""

import dataclasses
from typing import Any

import jax

from pallas_kernels import phases
from pallas_kernels.masks import Mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """`pallas_kernels.attention` with its defaults filled in; for `jax.tree`, its arrays.

    Attributes:
      q: queries [B, T, N, H].
      sources: `MixedSources`, keys [B, S, K, H] and values [B, S, K, H'].
      mask: `Mask`, which keys a query sees.
      scale: factor of the scores.
      softcap: scores become softcap * tanh(score / softcap); None for no cap.
    """

    # Any, as jax also fills trees with tracers, gradients and placeholders.
    q: Any
    sources: Any
    mask: Any
    scale: float
    softcap: float | None

    @property
    def phase(self) -> str:
        """One of `phases`."""
        length, heads = self.q.shape[1:3]
        keys, kv_heads = self.sources.keys[0].shape[1:3]
        return phases.phase(length * heads // kv_heads, length, keys)

    @property
    def mixed(self) -> int:
        """The larger number of sources, of keys or of values."""
        return max(len(self.sources.keys), len(self.sources.values))

    @property
    def size(self) -> int:
        """The larger head size, of keys or of values."""
        return max(self.sources.keys[0].shape[3], self.sources.values[0].shape[3])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedAttentionCall:
    """`pallas_kernels.paged_attention` likewise.

    Attributes:
      q: queries [B, T, N, H], the last T tokens of each row.
      pages: `Pages`.
      page_table: int32 [B, max_pages], within the pages.
      kv_lengths: int32 [B], tokens of each row.
      key_weights, value_weights: [J, K, H] and [J', K, H'], or None for one source.
      window: positions that a query sees; None for all.
      scale, softcap: as of `AttentionCall`.
    """

    q: Any
    pages: Any
    page_table: Any
    kv_lengths: Any
    key_weights: Any
    value_weights: Any
    window: int | None
    scale: float
    softcap: float | None

    @property
    def phase(self) -> str:
        """One of `phases`."""
        return phases.PAGED

    @property
    def mixed(self) -> int:
        """The larger number of sources, of keys or of values."""
        return max(self.pages.num_keys, self.pages.num_values)

    @property
    def size(self) -> int:
        """The larger head size, of keys or of values."""
        return max(self.pages.key_size, self.pages.value_size)

    @property
    def mask(self) -> Mask:
        """Causal, over the tokens that a row has."""
        return Mask(causal=True, window=self.window, kv_lengths=self.kv_lengths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedAttentionCall:
    """`pallas_kernels.ragged_attention` likewise.

    Attributes:
      q: queries [T, N, H] of all rows.
      sources: `MixedSources` of `PagedStream`s with tables of R rows.
      rows: `RaggedRows`.
      window: positions that a query sees; None for all.
      scale, softcap: as of `AttentionCall`.
      residuals: the lse is wanted; without it one may be left out, as None.
    """

    q: Any
    sources: Any
    rows: Any
    window: int | None
    scale: float
    softcap: float | None
    residuals: bool

    @property
    def phase(self) -> str:
        """One of `phases`."""
        return phases.PAGED

    @property
    def mixed(self) -> int:
        """The larger number of sources, of keys or of values."""
        return max(len(self.sources.keys), len(self.sources.values))

    @property
    def size(self) -> int:
        """The larger head size, of keys or of values."""
        return max(self.sources.keys[0].shape[3], self.sources.values[0].shape[3])


jax.tree_util.register_dataclass(AttentionCall, ["q", "sources", "mask"], ["scale", "softcap"])
jax.tree_util.register_dataclass(
    PagedAttentionCall,
    ["q", "pages", "page_table", "kv_lengths", "key_weights", "value_weights"],
    ["window", "scale", "softcap"],
)
jax.tree_util.register_dataclass(
    RaggedAttentionCall, ["q", "sources", "rows"], ["window", "scale", "softcap", "residuals"]
)
