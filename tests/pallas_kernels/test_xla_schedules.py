"""Every schedule of the XLA implementation passes all cases, whichever would choose it; and so does
the folded form, which calls it."""

from unittest import mock

from pallas_kernels.xla.plan import BlockPlan
from tests.pallas_kernels.attention_cases import AttentionCases
from tests.pallas_kernels.cases import CORE
from tests.pallas_kernels.implementation import Implementation
from tests.pallas_kernels.stored_cases import PagedCases, QuantizedCases

# What the others are part of, or the test of chunks tries, is left out.
FORCED = ("full", *(x for x in CORE if x not in ("plain", "chunk", "left_padded")))


class _Forced(Implementation):
    """A schedule with blocks so small that every case has several, the last one ragged."""

    implementation = "xla"
    cases = FORCED
    paged = ("one_token", "window", "chunk", "uneven")
    rounded = ("fused_80",)
    formats = ("int8", "int4")
    examples = 2

    def attend(self, arguments, options):
        with (
            mock.patch.object(BlockPlan, "choose", self.choose),
            mock.patch.object(BlockPlan, "choose_backward", self.choose_backward),
        ):
            return super().attend(arguments, options)

    def attend_pages(self, *arguments):
        choose = lambda q_shape, key_shape: self.choose(q_shape, key_shape, None)  # noqa: E731
        with mock.patch.object(BlockPlan, "choose_paged", choose):
            return super().attend_pages(*arguments)


class Rows(_Forced):
    @staticmethod
    def choose(q_shape, key_shape, mask):
        return BlockPlan(schedule="rows", batch=1, queries=min(8, q_shape[1]), keys=key_shape[1])

    choose_backward = choose


class Tiles(_Forced):
    @staticmethod
    def choose(q_shape, key_shape, mask):
        block_q, block_k = min(8, q_shape[1]), min(11, key_shape[1])
        return BlockPlan(schedule="blocks", batch=1, queries=block_q, keys=block_k)

    choose_backward = choose


class Decode(_Forced):
    @staticmethod
    def choose(q_shape, key_shape, mask):
        block_k = min(11, key_shape[1])
        return BlockPlan(schedule="decode", batch=q_shape[0], queries=q_shape[1], keys=block_k)

    choose_backward = staticmethod(Tiles.choose)


class TestRows(Rows, AttentionCases):
    pass


class TestRowsQuantized(Rows, QuantizedCases):
    pass


class TestTiles(Tiles, AttentionCases):
    pass


class TestTilesQuantized(Tiles, QuantizedCases):
    pass


class TestTilesPaged(Tiles, PagedCases):
    pass


class TestDecode(Decode, AttentionCases):
    pass


class TestDecodeQuantized(Decode, QuantizedCases):
    pass


class TestDecodePaged(Decode, PagedCases):
    pass


class TestFolded(AttentionCases):
    implementation = "folded"
    cases = FORCED
    rounded = ("fused_96", "cancelling")
    examples = 2
