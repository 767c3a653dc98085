"""Which tiles the kernels take."""

import jax.numpy as jnp
import pytest

from pallas_kernels.sources import MixedSources
from pallas_kernels.tpu.blocks import Blocks
from pallas_kernels.tpu.chips import CHIPS
from pallas_kernels.tpu.how import How
from tests.pallas_kernels.tpu.calls import floats, spec


@pytest.mark.parametrize(
    ("chip", "sources", "size", "full"),
    [
        ("v5e", 1, 128, 256),
        ("v5p", 2, 128, 256),
        ("v6e", 1, 256, 256),
        ("v6e", 3, 128, 512),
        ("tpu7x", 1, 64, 256),
        ("tpu7x", 1, 256, 512),
    ],
)
def test_products_are_short_where_the_schedule_of_the_chip_gains_by_it(chip, sources, size, full):
    how, q = How(1.0, None, CHIPS[chip]), jnp.zeros((1, 2048, 8, size))
    side = (spec(1, 3000, 2, size),) * sources
    weights = floats(sources, 2, size) if sources > 1 else None
    assert how.tile(q, MixedSources(side, side, weights, weights)) == Blocks(256, 1024, 512, full)


def test_blocks_of_short_sequences_are_whole_products():
    side = (spec(1, 1, 1, 128),)
    sources = MixedSources(side, side, None, None)
    found = (Blocks.choose(8, 100, keys).on(CHIPS["v5e"], sources) for keys in (100, 384, 530, 896))
    assert [(x.keys, x.compute, x.full) for x in found] == [
        (128, 128, 128), (384, 384, 384), (768, 384, 256), (1024, 512, 256),
    ]  # fmt: skip
