"""Every schedule of the XLA implementation passes all cases, whichever would choose it."""

from unittest import mock

from pallas_kernels.xla.plan import Blocks
from tests.pallas_kernels.attention_cases import AttentionCases


class _Forced(AttentionCases):
    """A schedule with blocks so small that every case has several, the last one ragged."""

    implementation = "xla"

    def attend(self, arguments, options):
        with (
            mock.patch.object(Blocks, "choose", self.choose),
            mock.patch.object(Blocks, "choose_backward", self.choose_backward),
        ):
            return super().attend(arguments, options)


class TestRows(_Forced):
    @staticmethod
    def choose(q_shape, key_shape, mask):
        return Blocks(schedule="rows", batch=1, queries=min(8, q_shape[1]), keys=key_shape[1])

    choose_backward = choose


class TestBlocks(_Forced):
    @staticmethod
    def choose(q_shape, key_shape, mask):
        block_q, block_k = min(8, q_shape[1]), min(11, key_shape[1])
        return Blocks(schedule="blocks", batch=1, queries=block_q, keys=block_k)

    choose_backward = choose


class TestDecode(_Forced):
    @staticmethod
    def choose(q_shape, key_shape, mask):
        block_k = min(11, key_shape[1])
        return Blocks(schedule="decode", batch=q_shape[0], queries=q_shape[1], keys=block_k)

    choose_backward = staticmethod(TestBlocks.choose)
