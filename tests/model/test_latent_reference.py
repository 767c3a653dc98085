"""Latent attention and its fusion against a NumPy definition, token by token in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusedkv_jax as fkv
from fusedkv_jax.layouts import runs
from tests.oracles.decoder import rms_norm, rotated, small_config

MLA = dict(kv_lora_rank=12, nope_dim=6, rope_dim=8, v_dim=5)
TOKENS = np.random.default_rng(1).integers(0, 37, (2, 8))
TOLERANCE = 1e-4


def latent_config(layout, q_lora_rank=10):
    mla = fkv.MLAConfig(**MLA, q_lora_rank=q_lora_rank)
    return small_config(layout, num_layers=4, num_kv_heads=4, mla=mla)


def drawn_model(config, seed=0):
    """Our decoder with drawn parameters, and the same per layer in plain form."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(lambda: fkv.Decoder(config, rngs=nnx.Rngs(0))))
    filled, plain = [], {"layers": [{} for _ in range(config.num_layers)], "fusion": []}
    for path, variable in nnx.to_flat_state(state):
        shape = variable.get_value().shape
        name = path[-2] if path[-1] == "scale" else path[-1]
        draw = rng.normal(size=shape)
        if path[-1] == "scale":
            draw = 1 + 0.3 * draw
        elif path[0] not in ("mixing", "embedding"):
            fan_in = shape[1] * shape[2] if name == "o_proj" else shape[path[0] == "runs"]
            draw /= fan_in**0.5
        draw = draw.astype(np.float32)
        if path[0] == "runs":
            for c, i in enumerate(runs(config.kv_layout)[path[1]].layers(path[2])):
                plain["layers"][i][name] = draw[c]
        elif path[0] == "mixing":
            plain["fusion"].append(draw)
        else:
            plain[name] = draw
        filled.append((path, variable.replace(jnp.asarray(draw))))
    return nnx.merge(graph, nnx.from_flat_state(filled)), plain


def latent_logits(p, tokens, sources):
    """Logits [T, V]; `sources`: per layer a list of (layer, rotary-key weight, latent weight)."""
    latents, rope_keys = ([[] for _ in sources] for _ in range(2))
    result = []
    for t, token in enumerate(tokens):
        x = p["embedding"][token].astype(np.float64)
        for i, (layer, terms) in enumerate(zip(p["layers"], sources, strict=True)):
            normed = rms_norm(x, layer["attention_norm"])
            query = normed
            if "q_a_proj" in layer:
                query = rms_norm(normed @ layer["q_a_proj"], layer["q_a_norm"])
            q = np.einsum("d,dnh->nh", query, layer["q_proj"])
            q = np.concatenate([q[:, :6], rotated(q[:, 6:], t)], axis=1)
            if [j for j, *_ in terms] == [i]:
                both = normed @ layer["kv_a_proj"]
                latents[i].append(rms_norm(both[:12], layer["kv_a_norm"]))
                rope_keys[i].append(rotated(both[None, 12:], t)[0])
            latent = sum(u * np.array(latents[j]) for j, _, u in terms)  # [S, d_c]
            rope_key = sum(v * np.array(rope_keys[j]) for j, v, _ in terms)  # [S, d_r]
            up = np.einsum("sc,cnh->nsh", latent, layer["kv_b_proj"])
            out = np.zeros((4, 5))
            for n in range(4):
                keys = np.concatenate([up[n][:, :6], rope_key], axis=1)
                weights = np.exp(keys @ q[n] / np.sqrt(14))
                out[n] = weights / weights.sum() @ up[n][:, 6:]
            x = x + np.einsum("nh,nhd->d", out, layer["o_proj"])
            normed = rms_norm(x, layer["mlp_norm"])
            gate = normed @ layer["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (normed @ layer["up"])) @ layer["down"]
        result.append(rms_norm(x, p["final_norm"]) @ p["head"])
    return np.stack(result)


def plain_sources(p):
    return [[(i, 1.0, 1.0)] for i in range(4)]


def fused_sources(p):
    """Layers 2 and 3 fuse layers 0 and 1: rotary keys per pair, latents per channel."""
    keys, latents = (w[:, :, 0] for w in p["fusion"])
    keys = np.concatenate([keys, keys], axis=-1)
    upper = [[(j, keys[c, j], latents[c, j]) for j in (0, 1)] for c in (0, 1)]
    return plain_sources(p)[:2] + upper


def shared_sources(p):
    return plain_sources(p)[:2] + [[(1, 1.0, 1.0)]] * 2


@pytest.mark.parametrize(
    ("layout", "q_lora_rank", "sources"),
    [
        ("mla", 0, plain_sources),
        ("fusedkv:parameterization=normal", 10, fused_sources),
        ("yoco", 10, shared_sources),
    ],
)
def test_latent_layouts_are_their_definition(layout, q_lora_rank, sources):
    """The whole sequence expands latents; single tokens read them as they are."""
    model, plain = drawn_model(latent_config(layout, q_lora_rank))
    expected = np.stack([latent_logits(plain, row, sources(plain)) for row in TOKENS])
    assert expected.std() > 0.5
    tokens = jnp.asarray(TOKENS, jnp.int32)
    np.testing.assert_allclose(model(tokens), expected, rtol=0, atol=TOLERANCE)
    cache = fkv.KVCache.create(model.config, batch_size=2, max_length=8)
    logits, cache = fkv.prefill(model, tokens[:, :5], jnp.full(2, 5), cache)
    np.testing.assert_allclose(logits, expected[:, 4], rtol=0, atol=TOLERANCE)
    for t in range(5, 8):
        logits, cache = fkv.decode_step(model, tokens[:, t], cache)
        np.testing.assert_allclose(logits, expected[:, t], rtol=0, atol=TOLERANCE)
