"""Sums that one jaxlib gets wrong on CPUs: not used, and kept in XLA's own code."""

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest

from pallas_kernels import xla
from pallas_kernels.xla_flags import AFFECTED, FLAG, avoid_wrong_sums
from tests.oracles import attention as oracle
from tests.pallas_kernels.cases import call_of, close, draw

affected = pytest.mark.skipif(
    jaxlib.version.__version__ not in AFFECTED or jax.default_backend() != "cpu",
    reason="this jaxlib is not affected",
)
# What the flag of `xla_flags` prevents, for one program.
FUSED_SUMS = {FLAG: "LIBRARY_FUSION_TYPE_REDUCE"}


def test_the_flag_is_added_for_affected_releases_and_respects_the_user():
    for version, before, after in (
        ("0.10.2", {}, f"--{FLAG}=-reduce"),
        ("0.10.2", {"XLA_FLAGS": "--a=1"}, f"--a=1 --{FLAG}=-reduce"),
        ("0.10.2", {"XLA_FLAGS": f"--{FLAG}="}, f"--{FLAG}="),
        ("0.11.2", {}, None),
    ):
        environment = dict(before)
        assert avoid_wrong_sums(environment, version) == (environment != before)
        assert environment.get("XLA_FLAGS") == after


def _sums_under_an_identity(p, x, y):
    eye = jnp.eye(8)[:, None, :, None]
    one = lambda x: ((p @ x).reshape(1, 2, 8, 2, 8, 128) * eye).sum(4)  # noqa: E731
    return one(x) + one(y)


@affected
@pytest.mark.usefixtures("fresh_compilation")
def test_sums_are_right_in_this_process():
    rng = np.random.default_rng(0)
    arguments = [
        rng.normal(size=s).astype(np.float32) for s in ((1, 32, 512), *[(1, 512, 1024)] * 2)
    ]
    want = _sums_under_an_identity(*map(jnp.asarray, arguments))
    close(jax.jit(_sums_under_an_identity)(*arguments), want)


@affected
@pytest.mark.usefixtures("fresh_compilation")
def test_decoding_is_right_where_sums_are_fused():
    """As in a process that computed before it imported the kernels: two sources, H' != H."""
    arguments, _ = draw("sums", (1, 2, 512, 16, 8, 64, 128, 2, 2))
    want = oracle.attention(*arguments, {})
    attend = jax.jit(xla.attention, compiler_options=FUSED_SUMS)
    got = attend(call_of(arguments))
    jax.tree.map(close, got, want)
