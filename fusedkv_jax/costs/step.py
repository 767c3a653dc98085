"""What a step of a serving engine costs, as a function of the rows that it computes.

A step passes the tokens of many requests through the model together. All of them go through the
layers up to the last that caches anything (`prefill_depth`), and only the rows whose next token is
drawn go through the layers above and the output head.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Int

from fusedkv_jax.cache.storage import storage_type
from fusedkv_jax.cache.storage_types import FLOATS
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.costs.arguments import check
from fusedkv_jax.costs.cache import cache_bytes_per_token, token_bytes
from fusedkv_jax.costs.flops import fusion_flops, last_row_flops
from fusedkv_jax.costs.parameters import matrices, parameter_count
from fusedkv_jax.layouts import KINDS


@dataclass(frozen=True)
class StepWork:
    """FLOPs and bytes of memory traffic of one step."""

    flops: float
    weight_bytes: float
    cache_bytes: float


@dataclass(frozen=True)
class _Attention:
    """Layers of one window: what a visible key costs.

    Attributes:
        lower_flops: of one query in the layers that all tokens pass through.
        upper_flops: of one query in the layers above.
        lower_fusion: FLOPs of a request in the lower layers, whatever queries see the key.
        lower_bytes: of a request in the lower layers, likewise.
        upper_bytes: of a request in the layers above.
    """

    lower_flops: float = 0.0
    upper_flops: float = 0.0
    lower_fusion: float = 0.0
    lower_bytes: float = 0.0
    upper_bytes: float = 0.0


@dataclass(frozen=True)
class StepCosts:
    """Coefficients of a model's steps; `work` puts them together.

    Attributes:
        token_flops: of one token in the layers that all tokens pass through.
        row_flops: of one row in the layers above, with the output head.
        attention: by window.
        lower_weights: bytes of the parameters that every step reads.
        upper_weights: of those that a step with sampled rows reads besides.
        cache_bytes_per_token: what a token adds to the cache.
        parameter_bytes: of all parameters.
    """

    token_flops: float
    row_flops: float
    attention: dict[int | None, _Attention]
    lower_weights: float
    upper_weights: float
    cache_bytes_per_token: int
    parameter_bytes: int

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        dtype: DTypeLike = "bfloat16",
        cache_dtype: DTypeLike | None = None,
    ) -> StepCosts:
        """Coefficients of a configuration.

        Args:
            config: the model.
            dtype: of the parameters: float32, bfloat16, float16 or int8.
            cache_dtype: of the cache, in pages; as the parameters by default.

        Raises:
            ValueError: a cyclic layout, whose prompts cannot be cut into chunks; another dtype;
                an int4 cache, which pages do not hold.
        """
        check(config)
        layout = config.kv_layout
        if layout.is_cyclic:
            raise ValueError(
                f"layout {layout.spec or 'of the model'!r} is cyclic: what it computes depends"
                " on where a prompt is cut, so no step of chunks can be told; use a layout that"
                " reads downwards"
            )
        size = _parameter_size(dtype)
        cache_dtype = storage_type(dtype if cache_dtype is None else cache_dtype)
        if cache_dtype == "int4":
            raise ValueError("cache_dtype='int4': pages do not hold int4; use int8")
        flops, weights = [0.0, 0.0], [0.0, 0.0]
        keys = defaultdict(lambda: np.zeros(5))
        for i, layer in enumerate(layout.layers):
            upper = int(i >= layout.prefill_depth)
            per_key = config.geometry.flops_per_key(single=True)
            fusion = fusion_flops(config, i, 1)
            flops[upper] += last_row_flops(config, i, 1) - per_key - fusion
            weights[upper] += size * sum(matrices(config, layer).values())
            # Below, a key is fused once for all queries of a chunk; above there is one query.
            keys[layer.window][upper] += per_key
            keys[layer.window][1 if upper else 2] += fusion
            keys[layer.window][3 + upper] += sum(
                len(layout.attended(kind, i)) * token_bytes(config, kind, cache_dtype)
                for kind in KINDS
            )
        head = config.d_model * config.vocab_size
        return cls(
            token_flops=flops[0],
            row_flops=flops[1] + 2 * head,
            attention={window: _Attention(*values) for window, values in keys.items()},
            lower_weights=weights[0],
            upper_weights=weights[1] + size * head,
            cache_bytes_per_token=cache_bytes_per_token(config, cache_dtype),
            parameter_bytes=size * parameter_count(config),
        )

    def work(
        self,
        starts: Int[np.ndarray, "R"],
        counts: Int[np.ndarray, "R"],
        sampled: Bool[np.ndarray, "R"],
    ) -> StepWork:
        """What one step does.

        Args:
            starts: tokens of each request that are in the cache already.
            counts: tokens of it that are computed.
            sampled: whether its next token is drawn.
        """
        tokens, rows = int(counts.sum()), int(sampled.sum())
        flops = tokens * self.token_flops + rows * self.row_flops
        cache = tokens * self.cache_bytes_per_token
        ends = starts + counts
        for window, costs in self.attention.items():
            seen = ends if window is None else np.minimum(ends, window)
            reached = ends if window is None else np.minimum(ends, window + counts - 1)
            pairs = _pairs(starts, counts, window)
            flops += costs.lower_flops * pairs.sum() + costs.upper_flops * seen[sampled].sum()
            flops += costs.lower_fusion * reached.sum()
            cache += costs.lower_bytes * reached.sum() + costs.upper_bytes * seen[sampled].sum()
        weights = self.lower_weights + (self.upper_weights if rows else 0)
        return StepWork(float(flops), float(weights), float(cache))


def _parameter_size(dtype: DTypeLike) -> int:
    """Bytes of one parameter of this dtype."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    choices = (*FLOATS, "int8")
    if name not in choices:
        raise ValueError(f"dtype={dtype!r}; choose {', '.join(choices)}")
    return jnp.dtype(name).itemsize


def _pairs(starts: np.ndarray, counts: np.ndarray, window: int | None) -> np.ndarray:
    """Pairs of queries and the keys they see: the sum over a chunk of min(position + 1, window)."""
    if window is None:
        return counts * starts + counts * (counts + 1) // 2
    growing = np.clip(window - starts, 0, counts)  # queries that see everything before them
    return growing * starts + growing * (growing + 1) // 2 + (counts - growing) * window
