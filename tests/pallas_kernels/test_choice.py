"""The table behind "auto", what happens when an implementation refuses, and the cuDNN form."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import choice
from tests.oracles import attention as oracle
from tests.pallas_kernels.cases import close, draw

Q, KV = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 5, 2, 8))
V5E, V6E, H100 = ("tpu", "TPU v5 lite"), ("tpu", "TPU v6 lite"), ("gpu", "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    ("device", "phase", "size", "expected"),
    [
        (("cpu", "cpu"), "sequence", 64, ("xla",)),
        (("cpu", "cpu"), "paged", 64, ("xla",)),
        (V6E, "sequence", 128, ("tpu", "folded", "xla")),
        (V5E, "sequence", 128, ("tpu", "xla")),
        (V5E, "sequence", 64, ("tpu", "folded", "xla")),
        (V5E, "decode", 64, ("tpu", "xla")),
        (H100, "sequence", 128, ("triton", "xla")),
        (H100, "decode", 128, ("triton", "xla")),
        (H100, "paged", 128, ("triton", "xla")),
    ],
)
def test_the_table(device, phase, size, expected):
    call = choice.CallTraits(platform=device[0], kind=device[1], phase=phase, sources=2, size=size)
    assert choice.candidates(call) == expected


def test_every_row_says_what_it_rests_on():
    for row in choice.TABLE:
        assert row.implementation in pallas_kernels.implementations()
        assert any(word in row.evidence for word in ("timed", "Measured"))


def test_a_program_for_another_device_is_chosen_for_that_device():
    abstract = jax.sharding.AbstractDevice(device_kind=V6E[1], num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    assert choice.device()[0] == "cpu"
    with jax.sharding.use_abstract_mesh(mesh):
        assert choice.device() == V6E
        call = choice.describe("sequence", 2, 128)
    assert choice.candidates(call)[0] == "tpu"


@pytest.mark.parametrize("implementation", ["auto", "folded", "tpu", "triton"])
@pytest.mark.parametrize(("length", "keys"), [(3, 0), (0, 5), (1, 0)])
def test_what_has_no_queries_or_keys_is_zero_everywhere(length, keys, implementation):
    """Kernels have no blocks for it."""
    q, kv = Q[:, :length], KV[:, :keys]

    def call(q):
        return pallas_kernels.attention(
            q, (kv,), (kv,), implementation=implementation, return_residuals=True
        )

    out, lse = call(q)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert (out == 0).all() and (lse == -jnp.inf).all()
    assert (jax.grad(lambda q: call(q)[0].sum())(q) == 0).all()


@pytest.fixture
def far(monkeypatch):
    """An implementation that refuses every call, preferred on every device."""

    def refuse(*_, **__):
        raise NotImplementedError("needs a device")

    module = types.SimpleNamespace(attention=refuse)
    monkeypatch.setitem(sys.modules, "pallas_kernels.far", module)
    monkeypatch.setitem(choice.MODULES, "far", "pallas_kernels.far")
    row = choice.Preference(
        platform="any", phases=("sequence", "decode", "paged"), implementation="far", evidence=""
    )
    monkeypatch.setattr(choice, "TABLE", (row, *choice.TABLE))


@pytest.mark.usefixtures("far")
def test_a_refusal_falls_through_under_auto_and_is_loud_when_named(monkeypatch):
    assert pallas_kernels.attention(Q, (KV,), (KV,)).shape == Q.shape
    with pytest.raises(NotImplementedError, match="needs a device"):
        pallas_kernels.attention(Q, (KV,), (KV,), implementation="far")
    monkeypatch.setattr(choice, "TABLE", choice.TABLE[:1])
    with pytest.raises(NotImplementedError, match="serves this call; far: needs a device"):
        pallas_kernels.attention(Q, (KV,), (KV,))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(choice.MODULES, "triton", "pallas_kernels.no_such_part")
    with pytest.raises(NotImplementedError, match="'triton' needs what is missing: .*no_such_part"):
        pallas_kernels.attention(Q, (KV,), (KV,), implementation="triton")


class TestCudnn:
    """There is no cuDNN here: XLA computes in its place what the form asks of it."""

    SHAPE = (2, 20, 20, 4, 2, 16, 16, 2, 2)

    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch):
        def attention(*arguments, implementation, **options):
            assert implementation == "cudnn"
            return plain(*arguments, implementation="xla", **options)

        plain = jax.nn.dot_product_attention
        monkeypatch.setattr(jax.nn, "dot_product_attention", attention)

    def arguments(self):
        arguments, _ = draw("cudnn", self.SHAPE)
        low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), arguments[:3])
        return (*low, *map(jnp.asarray, arguments[3:]))

    def attend(self, *arguments, **options):
        return pallas_kernels.attention(*arguments, implementation="cudnn", **options)

    @pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 6, "scale": 0.4}])
    def test_values(self, options):
        arguments = self.arguments()
        close(self.attend(*arguments, **options), oracle.attention(*arguments, options)[0], 0.02)

    def test_gradients(self):
        arguments = self.arguments()
        out, pull = jax.vjp(self.attend, *arguments)
        want = oracle.attention(*arguments, {}, out, np.zeros(out.shape[:3]))[2]
        jax.tree.map(lambda x, y: close(x, y, 0.03), pull(out), want)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"kv_lengths": jnp.array([20, 9])}, "positions, lengths and segments"),
            ({"softcap": 2.0}, "softcap"),
            ({"window": 3, "causal": False}, "one-sided window"),
            ({"return_residuals": True}, "'cudnn' returns no residuals"),
        ],
    )
    def test_what_it_cannot_do_is_refused(self, options, reason):
        with pytest.raises(NotImplementedError, match=reason):
            self.attend(*self.arguments(), **options)

    def test_shapes_and_types_that_it_cannot_do_are_refused(self):
        q, keys, values, a, b = self.arguments()
        with pytest.raises(NotImplementedError, match="aligns 5 queries with the first"):
            self.attend(q[:, -5:], keys, values, a, b)
        with pytest.raises(NotImplementedError, match="q is float32"):
            self.attend(q.astype(jnp.float32), keys, values, a, b)
