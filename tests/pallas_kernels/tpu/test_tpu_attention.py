"""The TPU kernels pass the shared tests when they are interpreted on any device."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tpu
from pallas_kernels.masks import Mask
from pallas_kernels.sources import MixedSources
from pallas_kernels.tpu import attend, chips
from pallas_kernels.tpu.blocks import Blocks
from tests.pallas_kernels.attention_cases import AttentionCases
from tests.pallas_kernels.implementation import Implementation
from tests.pallas_kernels.stored_cases import PagedCases, QuantizedCases


def split(arguments, options):
    """Arguments of a backend from those of `pallas_kernels.attention`."""
    options = dict(options)
    scale = options.pop("scale", None) or arguments[0].shape[-1] ** -0.5
    softcap = options.pop("softcap", None)
    as_jax = lambda x: jnp.asarray(x) if hasattr(x, "shape") else x  # noqa: E731
    arguments, options = jax.tree.map(as_jax, (arguments, options))
    return arguments, Mask(**{"causal": True, **options}), scale, softcap


class Tpu(Implementation):
    """What the chip chooses: decode, folded or, for two sources of 128 channels, tile."""

    chip = "v5e"
    examples = 2
    cases = ("fused", "one_token", "window_block", "segments", "left_padded", "nothing")
    rounded = ("fused_64", "cancelling")
    # Formats in which this chip can read a cache.
    unsupported = frozenset({"int4", "float8_e4m3fn"})

    def attend(self, arguments, options):
        arguments, mask, scale, softcap = split(arguments, options)
        return tpu.attention(
            *arguments, mask, scale=scale, softcap=softcap, chip=self.chip, interpret=True
        )

    def attend_pages(self, q, pages, page_table, kv_lengths, key_weights, value_weights, options):
        return tpu.paged_attention(
            q, pages, page_table, kv_lengths, key_weights, value_weights, interpret=True,
            window=options.get("window"), softcap=options.get("softcap"), chip=self.chip,
            scale=q.shape[-1] ** -0.5,
        )  # fmt: skip


class Tile(Tpu):
    """The tile kernel whatever the sizes, in blocks so small that there are several."""

    cases = ("plain", "fused", "chunk", "ring", "softcap_ragged")
    rounded = ("fused_96",)
    examples = 2

    def attend(self, arguments, options):
        arguments, mask, scale, softcap = split(arguments, options)
        q, keys, values, *weights = arguments
        how = attend.How(scale, softcap, chips.CHIPS["v5e"])
        blocks = Blocks(16, 256, 128) if keys[0].shape[1] > 128 else Blocks(16, 128, 128)
        sources = MixedSources(keys, values, *weights)
        return attend.tiled(how, (blocks, blocks), True, q, sources, mask)


class TestTpu(Tpu, AttentionCases):
    pass


class TestTpuQuantized(Tpu, QuantizedCases):
    formats = ("int8", "float8_e5m2")


class TestTpuPaged(Tpu, PagedCases):
    paged = ("one_token", "window", "uneven", "heads_of_128")


@pytest.mark.slow
class TestTile(Tile, AttentionCases):
    pass
