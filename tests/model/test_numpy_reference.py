"""Every layout against the NumPy definition, which a plain table of sources drives."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles.decoder import Row, build, draw, logits, small_config

LAYERS, SPLIT, MID = 6, 3, 2
TOKENS = np.random.default_rng(1).integers(0, 37, (2, 10))
TOLERANCE = 1e-4


def tied(half):
    """A weight on rotated keys is the same for both channels of a pair."""
    return np.concatenate([half, half], axis=-1)


def lower(upper):
    """Three ordinary layers, then the given three."""
    return [own(i) for i in range(SPLIT)] + upper


def own(i, **options):
    return Row([(i, 1.0)], [(i, 1.0)], **options)


def reuse(key, value):
    return Row([(key, 1.0)], [(value, 1.0)])


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fused_rows(a0, am, b0, bm):
    """FusedKV: K = a0 K_0 + am K_mid and V = b0 V_0 + bm V_mid."""
    return lower(
        [Row([(0, a0[c]), (MID, am[c])], [(0, b0[c]), (MID, bm[c])]) for c in range(LAYERS - SPLIT)]
    )


def fusedkv():
    keys, values = normal(2, 3, 2, 2, 4), normal(3, 3, 2, 2, 8)
    rows = fused_rows(tied(keys[:, 0]), tied(keys[:, 1]), values[:, 0], values[:, 1])
    return rows, [keys, values]


def fusedkv_iterative():
    """K_i = p K_{i-1} + r K_mid and V_i = s V_{i-1} + t V_0, from the layer below."""
    keys, values = normal(4, 3, 2, 2, 4), normal(5, 3, 2, 2, 8)
    (p, r), (t, s) = (tied(keys[:, j]) for j in (0, 1)), (values[:, j] for j in (0, 1))
    a0, am, b0, bm = [p[0]], [r[0]], [t[0]], [s[0]]
    for c in (1, 2):
        a0.append(p[c] * a0[-1])
        am.append(p[c] * am[-1] + r[c])
        b0.append(s[c] * b0[-1] + t[c])
        bm.append(s[c] * bm[-1])
    return fused_rows(a0, am, b0, bm), [keys, values]


def fusedkv_shared_heads():
    keys, values = normal(6, 3, 2, 4), normal(7, 3, 2, 8)
    rows = fused_rows(tied(keys[:, 0]), tied(keys[:, 1]), values[:, 0], values[:, 1])
    return rows, [keys, values]


def three_key_sources():
    keys, values = normal(8, 3, 3), normal(9, 3, 2)
    rows = [
        Row(list(enumerate(k)), [(0, v[0]), (1, v[1])]) for k, v in zip(keys, values, strict=True)
    ]
    return lower(rows), [keys, values]


def lite_learnable():
    keys, values = normal(10, 3, 1, 2, 4), normal(11, 3, 1, 2, 8)
    rows = [Row([(MID, tied(keys[c, 0]))], [(0, values[c, 0])]) for c in range(3)]
    return lower(rows), [keys, values]


def dense_fusion():
    keys, values = normal(12, 3, 3), normal(13, 3, 3)
    pairs = zip(keys, values, strict=True)
    return lower([Row(list(enumerate(k)), list(enumerate(v))) for k, v in pairs]), [keys, values]


def yoco_pp():
    keys, values = normal(14, 2, 2) / 35, normal(15, 2, 2) / 35  # (layer 0's, own)
    rows = [own(0)]
    for i in (1, 2):
        (k0, k1), (v0, v1) = 35 * keys[i - 1], 35 * values[i - 1]
        rows.append(Row([(0, k0), (i, k1)], [(0, v0), (i, v1)]))
    return rows + [reuse(MID, MID)] * 3, [keys, values]


def resformer():
    lam = normal(16, 5, 1)
    rows = [Row([(i, 1.0)], [(i, lam[i - 1, 0]), (0, 1 - lam[i - 1, 0])]) for i in range(1, LAYERS)]
    return [own(0), *rows], [lam]


def plain(rows):
    return lambda: (rows, [])


# layout: function that gives (table, stored stream weights)
LAYOUTS = {
    "mha": plain([own(i) for i in range(LAYERS)]),
    "fusedkv": fusedkv,
    "fusedkv:parameterization=iterative": fusedkv_iterative,
    "fusedkv:granularity=shared_channel": fusedkv_shared_heads,
    "fusedkv:granularity=scalar,key_sources=0+1+2,value_sources=0+1": three_key_sources,
    "fusedkv_lite": plain(lower([reuse(MID, 0)] * 3)),
    "lite_reversed": plain(lower([reuse(0, MID)] * 3)),
    "lite_learnable": lite_learnable,
    "dense_fusion": dense_fusion,
    "yoco": plain(lower([reuse(MID, MID)] * 3)),
    "yoco:window=4,own_norm=true": plain(
        [own(i, window=4) for i in range(3)] + [own(3, kv_norm=True)] + [reuse(3, 3)] * 2
    ),
    "yoco_pp": yoco_pp,
    "cla:k=2": plain([own(0), reuse(0, 0), own(2), reuse(2, 2), own(4), reuse(4, 4)]),
    "cla:k=4": plain([own(0)] + [reuse(0, 0)] * 3 + [own(4), reuse(4, 4)]),
    "mlkv:m=4": plain(
        [own(0), own(1), reuse(1, 1), own(3), own(4), reuse(4, 4)]  # floor(6 (i + 1) / 4)
    ),
    "svformer": plain([own(0)] + [Row([(i, 1.0)], [(0, 1.0)]) for i in range(1, LAYERS)]),
    "svformer_half": plain(
        [own(0), reuse(0, 0)] + [Row([(i, 1.0)], [(0, 1.0)]) for i in range(2, LAYERS)]
    ),
    "resformer": resformer,
    "0_1s3_2_k1v0s5_2_3": plain(
        [
            own(0),
            own(1, window=3),
            own(2),
            # Layer 3 has projections, which layer 5 reads, and attends to others itself.
            Row([(1, 1.0)], [(0, 1.0)], window=5, serves=True),
            reuse(2, 2),
            reuse(3, 3),
        ]
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_its_definition(layout):
    rows, fusion = LAYOUTS[layout]()
    config = small_config(layout)
    drawn = draw(config)
    expected = np.stack([logits(drawn, rows, row) for row in TOKENS])
    assert expected.std() > 0.5
    model = build(config, drawn, fusion)
    np.testing.assert_allclose(
        model(jnp.asarray(TOKENS, jnp.int32)), expected, rtol=0, atol=TOLERANCE
    )
