"""Layer-condensed KV: the parallel form against the token-by-token definition, and its gradient."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusedkv_jax as fkv
from fusedkv_jax.model.block import Block
from tests.oracles.decoder import Row, build, draw, logits, small_config

# One warm-up layer below and one above; layers 1 to 3 read layer 4, the top of those between.
ROWS = [Row([(j, 1.0)], [(j, 1.0)]) for j in (0, 4, 4, 4, 4, 5)]
TOKENS = np.random.default_rng(1).integers(0, 37, (2, 8))
TOLERANCE = 1e-4


def condensed(free, learning, **changes):
    return small_config(f"lckv:w=2,forward_passes={free},backward_passes={learning}", **changes)


@pytest.fixture(scope="module")
def drawn():
    return draw(condensed(7, 2))


@pytest.fixture(scope="module")
def expected(drawn):
    return np.stack([logits(drawn, ROWS, row) for row in TOKENS])


def ours(config, drawn, tokens=TOKENS, **options):
    return np.asarray(build(config, drawn)(jnp.asarray(tokens, jnp.int32), **options))


def test_as_many_passes_as_tokens_are_token_by_token(drawn, expected):
    np.testing.assert_allclose(ours(condensed(6, 2), drawn), expected, rtol=0, atol=TOLERANCE)


def test_error_falls_with_passes_and_first_tokens_are_exact(drawn, expected):
    errors = []
    for free, learning in ((0, 1), (1, 1), (4, 1)):
        error = ours(condensed(free, learning), drawn) - expected
        passes = free + learning
        assert np.abs(error[:, :passes]).max() < TOLERANCE
        errors.append(np.sqrt(np.mean(error**2)))
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2] > 0.01, errors


def test_first_token_has_no_attention_output(drawn, expected):
    """Its reading layers have nothing to attend to: their output projections do not matter."""
    other = draw(condensed(6, 2))
    rng = np.random.default_rng(5)
    for i in (1, 2, 3):
        shape = other.layers[i]["o_proj"].shape
        other.layers[i]["o_proj"] = rng.normal(size=shape).astype(np.float32)
    changed = ours(condensed(6, 2), other)
    np.testing.assert_allclose(changed[:, 0], expected[:, 0], rtol=0, atol=TOLERANCE)
    assert np.abs(changed[:, 1] - expected[:, 1]).max() > 0.1


def test_packed_documents_each_begin_with_nothing(drawn, expected):
    tokens = TOKENS.reshape(1, -1)
    segments = jnp.asarray([[4] * 8 + [7] * 8], jnp.int32)
    packed = ours(condensed(6, 2), drawn, tokens, segment_ids=segments)
    np.testing.assert_allclose(packed.reshape(2, 8, -1), expected, rtol=0, atol=TOLERANCE)


def test_prefill_and_decode_are_token_by_token(drawn, expected):
    """Decoding is exact whatever the passes of the parallel form; a prompt needs one a token."""
    model = build(condensed(2, 1), drawn)
    cache = fkv.KVCache.create(model.config, batch_size=2, max_length=8)
    tokens = jnp.asarray(TOKENS, jnp.int32)
    last, cache = fkv.prefill(model, tokens[:, :3], jnp.asarray([3, 2]), cache)
    np.testing.assert_allclose(
        last, np.stack([expected[0, 2], expected[1, 1]]), rtol=0, atol=TOLERANCE
    )
    for step in range(5):
        token = jnp.stack([tokens[0, 3 + step], tokens[1, 2 + step]])
        last, cache = fkv.decode_step(model, token, cache)
        wanted = np.stack([expected[0, 3 + step], expected[1, 2 + step]])
        np.testing.assert_allclose(last, wanted, rtol=0, atol=TOLERANCE)


# The parallel form written out: no loop primitive, every pass in a row, float32.


@dataclass(frozen=True)
class Cyclic:
    """Which layer each layer reads, and the half-open ranges that are iterated."""

    spec: str
    sources: tuple
    groups: dict


CONDENSED = Cyclic("lckv:w=2", (0, 4, 4, 4, 4, 5), {1: 5})
# Two groups; between them a layer that reads one from below the first.
TWO_GROUPS = Cyclic("0_2_2_0_5_5", (0, 2, 2, 0, 5, 5), {1: 3, 4: 6})


def unrolled(p, tokens, free, learning, layout):
    """Logits [T, V] of one sequence after free + learning passes of every group."""
    x, i = p["embedding"][tokens], 0
    streams = {j: (jnp.zeros((len(tokens), 2, 8)),) * 2 for j in layout.sources}
    while i < len(layout.sources):
        stop = layout.groups.get(i)
        start = x
        for number in range(1 if stop is None else free + learning):
            if stop is not None and number <= free:
                # The first learning pass reads what the last free one left.
                inside = {j: streams[j] for j in streams if i <= j < stop}
                streams |= jax.lax.stop_gradient(inside)
            x = start
            for j in range(i, stop or i + 1):
                source = layout.sources[j]
                given = None if source == j else streams[source]
                x, own = _through(p, j, x, given, strict=source > j)
                streams |= {} if own is None else {j: own}
        i = stop or i + 1
    return _norm(x, p["final_norm"]) @ p["head"]


def _norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def _rotate(x):
    angles = jnp.arange(len(x))[:, None, None] * 10_000.0 ** (-jnp.arange(4) / 4)
    a, b = x[..., :4], x[..., 4:]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _through(p, i, x, streams, strict):
    """One layer over all tokens, and its streams; or with those of another layer instead."""
    layer, own = p["layers"][i], None
    normed = _norm(x, layer["attention_norm"])
    q = _rotate(_norm(jnp.einsum("td,dnh->tnh", normed, layer["q_proj"]), layer["q_norm"]))
    seen = jnp.tril(jnp.ones((len(x), len(x)), bool), -1 if strict else 0)
    if streams is None:
        key = _norm(jnp.einsum("td,dkh->tkh", normed, layer["k_proj"]), layer["k_norm"])
        streams = own = (_rotate(key), jnp.einsum("td,dkh->tkh", normed, layer["v_proj"]))
    keys, values = (jnp.repeat(stream, 2, axis=1) for stream in streams)
    scores = jnp.einsum("tnh,snh->nts", q, keys) / jnp.sqrt(8.0)
    powers = jnp.where(seen, jnp.exp(scores), 0.0)
    total = powers.sum(axis=-1, keepdims=True)
    weights = jnp.where(total > 0, powers / jnp.where(total > 0, total, 1.0), 0.0)
    x = x + jnp.einsum("nts,snh,nhd->td", weights, values, layer["o_proj"])
    normed = _norm(x, layer["mlp_norm"])
    hidden = jax.nn.silu(normed @ layer["gate"]) * (normed @ layer["up"])
    return x + hidden @ layer["down"], own


def definition(drawn, cotangent, free, learning, layout=CONDENSED):
    """Gradient, and the logits that it is of."""

    def loss(p):
        one = jax.vmap(lambda tokens: unrolled(p, tokens, free, learning, layout))
        logits = one(jnp.asarray(TOKENS))
        return jnp.sum(logits * cotangent), logits

    names = ("embedding", "final_norm", "head", "layers")
    p = {name: getattr(drawn, name) for name in names}
    return jax.jit(jax.grad(loss, has_aux=True))(p)


def our_gradient(drawn, cotangent, config):
    """Gradient in the plain form, from our stacked one."""
    model = build(config, drawn)
    graph, state = nnx.split(model)
    tokens = jnp.asarray(TOKENS, jnp.int32)

    def loss(state):
        return jnp.sum(nnx.merge(graph, state)(tokens) * cotangent)

    gradient = {}
    for path, variable in nnx.to_flat_state(jax.jit(jax.grad(loss))(state)):
        name = path[-2] if path[-1] == "scale" else path[-1]
        value = np.asarray(variable.get_value())
        if path[0] != "runs":
            gradient[name] = value
            continue
        layers = fkv.layouts.runs(model.config.kv_layout)[path[1]].layers(path[2])
        gradient.update({(i, name): value[c] for c, i in enumerate(layers)})
    return gradient


def test_gradient_reaches_the_learning_passes_only(drawn):
    cotangent = np.random.default_rng(9).normal(size=(2, 8, 37)).astype(np.float32)
    wanted, _ = definition(drawn, cotangent, free=1, learning=2)
    fewer, _ = definition(drawn, cotangent, free=2, learning=1)
    got = our_gradient(drawn, cotangent, condensed(1, 2))
    assert (1, "k_proj") not in got and (4, "k_proj") in got
    for key, value in got.items():
        one, other = (
            np.asarray(g[key] if isinstance(key, str) else g["layers"][key[0]][key[1]])
            for g in (wanted, fewer)
        )
        size = np.abs(one).max()
        assert size > 1e-2
        np.testing.assert_allclose(value, one, rtol=0, atol=1e-4 * size, err_msg=str(key))
        if key in {(4, "k_proj"), (4, "v_proj"), (2, "o_proj"), (0, "down")}:
            assert np.abs(one - other).max() > 0.01 * size  # the number of passes matters


def test_every_group_is_iterated_by_itself(drawn):
    """Logits and gradients, which also flow past a group to layers below it."""
    config = small_config(f"{TWO_GROUPS.spec}:passes=1+2")
    cotangent = np.random.default_rng(9).normal(size=(2, 8, 37)).astype(np.float32)
    gradient, wanted = definition(drawn, cotangent, 1, 2, TWO_GROUPS)
    np.testing.assert_allclose(ours(config, drawn), wanted, rtol=0, atol=TOLERANCE)
    for key, value in our_gradient(drawn, cotangent, config).items():
        one = np.asarray(
            gradient[key] if isinstance(key, str) else gradient["layers"][key[0]][key[1]]
        )
        size = np.abs(one).max()
        np.testing.assert_allclose(value, one, rtol=0, atol=1e-4 * size, err_msg=str(key))


def test_layers_between_groups_run_once(monkeypatch):
    """Two groups of two layers and eight layers between, 7 + 2 passes: 2 * 2 * 9 + 8."""
    ran = []
    original = Block.project

    def count(self, x, rotation):
        jax.debug.callback(lambda: ran.append(1))
        return original(self, x, rotation)

    monkeypatch.setattr(Block, "project", count)
    config = small_config("1_1_2_3_4_5_6_7_8_9_11_11", num_layers=12)
    model = fkv.Decoder(config, rngs=nnx.Rngs(0))
    model(jnp.zeros((1, 16), jnp.int32)).block_until_ready()
    jax.effects_barrier()
    assert len(ran) == 44


def test_acyclic_layouts_take_one_pass():
    layout = fkv.layouts.get("lckv", 6, w=2, target="bottom")
    assert not layout.is_cyclic
    assert fkv.layouts.get("lckv", 6, w=2).cyclic_groups == ((1, 5),)
