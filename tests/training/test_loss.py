"""The chunked loss against the plain one, on one device and on meshes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fusedkv_jax import Decoder, presets
from fusedkv_jax.sharding import MeshConfig, make_mesh
from fusedkv_jax.training.early_exit import exit_loss
from fusedkv_jax.training.loss import (
    batch_loss,
    head_cross_entropy,
    logits_at_a_time,
    sum_cross_entropy,
)

B, T, D, V = 8, 16, 8, 64
MESHES = {
    "one device": MeshConfig(devices=1),
    "fsdp x context x tensor": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
    "data x tensor": MeshConfig(data=2, tensor=4),
    "rows that do not divide": MeshConfig(data=1, context=8),
}


def _inputs(vocabulary=V, rows=B):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, T, D)).astype(np.float32)
    head = rng.standard_normal((D, vocabulary)).astype(np.float32)
    mask = rng.integers(0, 2, (rows, T)).astype(np.float32)
    targets = np.where(mask, rng.integers(0, vocabulary, (rows, T)), -7).astype(np.int32)
    return tuple(map(jnp.asarray, (x, head, targets, mask)))


def _plain(x, head, targets, mask, cap=None):
    logits = jnp.einsum("btd,dv->btv", x, head)
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    return sum_cross_entropy(logits, targets, mask)


def _chunked(mib, cap=None):
    # The bound is in MiB; the tests need one of a few logits.
    def loss(*inputs):
        return head_cross_entropy(*inputs, logits_mib=mib, softcap=cap)

    return loss


def _compare(loss, inputs, cap=None):
    mask = inputs[3]
    plain = functools.partial(_plain, cap=cap)
    both = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    wanted, found = (jax.jit(both(f))(*inputs) for f in (plain, loss))
    np.testing.assert_allclose(found[0][0], wanted[0][0], rtol=1e-6)
    assert float(found[0][1]) == float(mask.sum())
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    total, _ = jax.jit(loss)(*inputs)  # without gradients it is another program
    np.testing.assert_allclose(total, wanted[0][0], rtol=1e-6)


def test_capped_logits():
    _compare(_chunked(7 * V * 4 / 2**20, cap=2.0), _inputs(), cap=2.0)


@pytest.mark.parametrize("early", [False, True])
def test_the_loss_of_a_model_is_that_of_its_logits(early):
    changes = {"logit_softcap": 1.5, "logit_scale": 3.0, "num_layers": 2, "max_length": T}
    config = presets.get("demo", layout="mha", vocab_size=V, d_model=24, d_ff=32, **changes)
    model = Decoder(config, rngs=nnx.Rngs(0))
    _, _, targets, mask = _inputs()
    tokens = jnp.where(mask != 0, targets, 0)
    batch = {"tokens": tokens, "targets": targets, "loss_mask": mask}
    batch |= {"segment_ids": jnp.ones_like(tokens), "positions": jnp.arange(T) + 0 * tokens}
    wanted = sum_cross_entropy(model(tokens), targets, mask)[0]
    if early:
        found = exit_loss(model, batch, jnp.array([0.0, 1.0]))[0]
    else:
        found = batch_loss(*nnx.split(model), batch)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("limit", [1e9, 1, 40 * V, 7 * V])
def test_chunks_of_any_size_give_loss_and_gradients_of_the_whole(limit):
    _compare(_chunked(limit * 4 / 2**20), _inputs())


@pytest.mark.parametrize("mesh", MESHES.values(), ids=list(MESHES))
@pytest.mark.parametrize(
    ("vocabulary", "rows"), [pytest.param(V, B, marks=pytest.mark.slow), (63, 6)]
)
def test_a_mesh_changes_nothing(mesh, vocabulary, rows):
    inputs = _inputs(vocabulary, rows)
    with jax.set_mesh(make_mesh(mesh)):
        _compare(_chunked(5 * V * 4 / 2**20), inputs)


def test_a_weighted_loss_scales_its_gradients():
    x, head, targets, mask = _inputs()
    loss = lambda x, scale: scale * _chunked(1)(x, head, targets, mask)[0]  # noqa: E731
    one, three = (jax.grad(loss)(x, jnp.float32(scale)) for scale in (1, 3))
    np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


def test_bfloat16_states_give_a_float32_loss_and_gradient_of_the_head():
    x, head, targets, mask = _inputs()
    loss = lambda x, head: _chunked(1)(x, head, targets, mask)[0]  # noqa: E731
    half = x.astype(jnp.bfloat16)
    total, (dx, dhead) = jax.value_and_grad(loss, (0, 1))(half, head)
    assert (total.dtype, dx.dtype, dhead.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    wanted = jax.grad(lambda head: _plain(x, head, targets, mask)[0])(head)
    np.testing.assert_allclose(dhead, wanted, rtol=0.05, atol=0.05)


def test_infinities_at_padding_do_not_matter():
    x, head, targets, mask = _inputs()
    x = jnp.where(mask[..., None] != 0, x, 1e38)
    loss = lambda x: _chunked(1)(x, 10 * head, targets, mask)[0]  # noqa: E731
    total, gradient = jax.value_and_grad(loss)(x)
    assert np.isfinite(total) and np.isfinite(gradient).all()


def test_no_array_of_the_program_holds_all_logits():
    x, head, targets, mask = _inputs()
    step = jax.jit(jax.value_and_grad(lambda *a: _chunked(8 * V * 4 / 2**20)(*a)[0], (0, 1)))
    text = step.lower(x, head, targets, mask).as_text()
    sizes = [
        np.prod([int(n) for n in shape.split("x")[:-1]])
        for shape in re.findall(r"tensor<((?:\d+x)+\w+)>", text)
    ]
    assert max(sizes) < B * T * V // 2


def test_a_device_holds_what_suits_it_unless_told():
    words = 4096
    assert logits_at_a_time(None, words) == 512 * words  # here, on a CPU
    assert logits_at_a_time(None, 258) == 2**20
    assert logits_at_a_time(2, words) == 2**19
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=tpu)):
        assert logits_at_a_time(None, words) == 512 * 2**18
