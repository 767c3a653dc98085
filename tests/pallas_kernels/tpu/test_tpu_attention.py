"""The TPU kernels pass the shared tests when they are interpreted on any device."""

import dataclasses

import jax.numpy as jnp
import pytest

from pallas_kernels import tpu
from pallas_kernels.tpu import attend, chips, decode_inputs, ragged_inputs
from pallas_kernels.tpu.blocks import Blocks
from pallas_kernels.tpu.how import How
from tests.pallas_kernels.attention_cases import AttentionCases
from tests.pallas_kernels.cases import I32, call_of, paged_call_of, ragged_call_of
from tests.pallas_kernels.implementation import Implementation
from tests.pallas_kernels.ragged_cases import STEPS, RaggedKernelCases
from tests.pallas_kernels.stored_cases import PagedCases, QuantizedCases


class Tpu(Implementation):
    """What the chip chooses: decode, folded or, for two sources of 128 channels, tile."""

    chip = "v5e"
    examples = 2
    cases = ("fused", "one_token", "window_block", "segments", "left_padded", "nothing")
    rounded = ("fused_64", "cancelling", "few_queries")
    # Formats in which this chip can read a cache.
    unsupported = frozenset({"int4", "float8_e4m3fn"})

    def attend(self, arguments, options):
        return tpu.attention(call_of(arguments, options), chip=self.chip, interpret=True)

    def attend_pages(self, *arguments):
        *arguments, options = arguments
        call = paged_call_of(*arguments, **options)
        return tpu.paged_attention(call, chip=self.chip, interpret=True)

    def attend_ragged(self, *arguments):
        *arguments, options = arguments
        call = ragged_call_of(*arguments, **options)
        return tpu.ragged_attention(call, chip=self.chip, interpret=True)


class Tile(Tpu):
    """The tile kernel whatever the sizes, in blocks so small that there are several."""

    cases = ("plain", "fused", "chunk", "ring", "softcap_ragged")
    rounded = ("fused_96",)
    examples = 2

    def attend(self, arguments, options):
        call = call_of(arguments, options)
        long = call.sources.keys[0].shape[1] > 128
        blocks = Blocks(16, 256, 128, 128) if long else Blocks(16, 128, 128)
        how = How(call.scale, call.softcap, chips.CHIPS["v5e"], True, blocks)
        return attend.tiled(how, call.q, call.sources, call.mask)


class TestTpu(Tpu, AttentionCases):
    pass


class TestTpuQuantized(Tpu, QuantizedCases):
    formats = ("int8", "float8_e5m2")

    @pytest.mark.parametrize(
        ("shape", "options"),
        [
            # In blocks of 128 tokens, the last of which overlaps the one before; a tail of 13.
            ((2, 2, 301, 4, 2, 16, 16, 2, 1), {"kv_lengths": I32([301, 180])}),
            ((1, 1, 40, 2, 2, 16, 16, 1, 1), {"kv_segment_ids": I32([[0] * 25 + [1] * 15])}),
            # Prefill: too many queries to read codes in place, so the tile kernel gets numbers.
            ((1, 33, 40, 4, 1, 16, 16, 2, 2), {"kv_lengths": I32([35])}),
        ],
        ids=["odd length", "segments", "prefill"],
    )
    def test_whatever_the_length_mask_and_number_of_queries(self, monkeypatch, shape, options):
        monkeypatch.setattr(decode_inputs, "BLOCK_BYTES", 1)
        if "kv_segment_ids" in options:
            options = options | {"q_segment_ids": I32([[0]])}
        self.both("int8", shape, options, self.quantized_tolerance)

    @pytest.mark.parametrize("lengths", [(130, 0, 301), (0, 0, 0)])
    def test_two_cores_share_the_blocks_of_all_rows(self, monkeypatch, lengths):
        monkeypatch.setattr(self, "chip", "v5p")
        monkeypatch.setattr(decode_inputs, "BLOCK_BYTES", 1)
        shape = (3, 1, 301, 4, 2, 16, 16, 2, 1)  # blocks of 128: the last row is cut
        self.both("int8", shape, {"kv_lengths": I32(lengths)}, self.quantized_tolerance)


class TestTpuPaged(Tpu, PagedCases):
    paged = ("one_token", "window", "uneven", "heads_of_128")

    def test_more_queries_than_one_product_takes(self, monkeypatch):
        monkeypatch.setattr(decode_inputs, "MAX_ROWS", 6)  # three of the seven tokens
        self.check_pages("chunk", "int8", self.paged_tolerance)

    def test_two_cores_share_the_blocks_of_all_rows(self, monkeypatch):
        monkeypatch.setattr(self, "chip", "v5p")
        monkeypatch.setattr(decode_inputs, "BLOCK_BYTES", 1)
        self.check_pages("uneven", "int8", self.paged_tolerance)


@pytest.mark.slow
class TestTile(Tile, AttentionCases):
    pass


class TestTpuRagged(Tpu, RaggedKernelCases):
    ragged = ("lanes", "int8", "tiles")

    def test_two_cores_share_the_pieces_and_a_row_gives_the_same(self, monkeypatch):
        monkeypatch.setattr(self, "chip", "v5p")
        self.test_a_row_gives_the_same_whoever_else_is_in_the_step()

    @pytest.mark.parametrize("counts", [(0, 0, 0, 1, 0, 0), (0,) * 6])
    def test_a_core_may_have_nothing_to_do(self, monkeypatch, counts):
        monkeypatch.setattr(self, "chip", "v5p")
        self.check_ragged(dataclasses.replace(STEPS["mixed"], counts=counts))


@pytest.mark.parametrize(
    ("costs", "count", "bounds"),
    [
        ([1, 1, 1, 1], 4, [0, 2, 4]),
        ([9, 1, 1, 1], 4, [0, 1, 4]),
        ([1, 1, 1, 9], 4, [0, 3, 4]),
        ([1, 1, 8, 8], 2, [0, 1, 2]),  # of which two are not used
        ([5, 1], 1, [0, 0, 1]),
        ([5, 1], 0, [0, 0, 0]),
    ],
)
def test_the_list_of_work_is_cut_where_both_parts_cost_about_the_same(costs, count, bounds):
    found = ragged_inputs.bounds_of(jnp.asarray(I32(costs)), jnp.asarray(count), 2)
    assert found.tolist() == bounds
