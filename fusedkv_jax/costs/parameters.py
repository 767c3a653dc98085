"""Exact numbers of parameters, by part of the model."""

from __future__ import annotations

import collections
import math

from fusedkv_jax.config import MLAConfig, ModelConfig
from fusedkv_jax.costs.arguments import check
from fusedkv_jax.layouts import KINDS, Kind, LayerKV, Stream


def parameter_count(config: ModelConfig) -> int:
    """Number of trained scalars: every element of every parameter array of the model."""
    return sum(parameter_breakdown(config).values())


def parameter_breakdown(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part; the parts add up to `parameter_count`.

    Returns:
        `embedding`; `head` (0 if tied); `queries`; `keys` and `values` (with MLA: `latent` for
        the down-projections and `latent_up` for the up-projections instead); `outputs` of
        attention; `feed_forward`; `norms`; `mixing` (learned weights of fusions and residuals).
    """
    check(config)
    parts = collections.Counter(embedding=config.vocab_size * config.d_model)
    parts["head"] = 0 if config.tie_embeddings else config.vocab_size * config.d_model
    for layer in config.kv_layout.layers:
        parts.update(matrices(config, layer))
        parts["norms"] += _norms(config, layer)
        parts["mixing"] += sum(_mixing(config, kind, layer.stream(kind)) for kind in KINDS)
    parts["norms"] += _norm(config, config.d_model)
    if any((config.block.qkv_bias, config.block.output_bias, config.block.mlp_bias)):
        parts["biases"] = sum(_biases(config, layer) for layer in config.kv_layout.layers)
    return dict(parts)


def matrices(config: ModelConfig, layer: LayerKV) -> dict[str, int]:
    """Number of parameters of one layer's matrices, by part."""
    feed_forward = {"feed_forward": (2 + config.block.gated) * config.d_model * config.d_ff}
    if config.mla is not None:
        return _latent_attention(config, config.mla, layer) | feed_forward
    queries = config.d_model * config.num_heads * config.channels
    stream = config.d_model * config.kv_heads * config.channels
    return {
        "queries": queries,
        "keys": stream * layer.key.own,
        "values": stream * layer.value.own,
        "outputs": queries,
        **feed_forward,
    }


def _latent_attention(config: ModelConfig, mla: MLAConfig, layer: LayerKV) -> dict[str, int]:
    heads, key_dim = config.num_heads, mla.nope_dim + mla.rope_dim
    if mla.q_lora_rank:
        queries = mla.q_lora_rank * (config.d_model + heads * key_dim)
    else:
        queries = config.d_model * heads * key_dim
    return {
        "queries": queries,
        "latent": config.d_model * (mla.kv_lora_rank + mla.rope_dim) * layer.caches,
        "latent_up": mla.kv_lora_rank * heads * (mla.nope_dim + mla.v_dim),
        "outputs": heads * mla.v_dim * config.d_model,
    }


def _norms(config: ModelConfig, layer: LayerKV) -> int:
    branches = 4 if config.block.norm_placement == "both" else 2
    count = _norm(config, config.d_model) * (branches + layer.kv_norm)
    if config.mla is not None:
        return count + config.mla.q_lora_rank + config.mla.kv_lora_rank * layer.caches
    if not config.qk_norm:
        return count
    heads, kv_heads = 1, 1
    if config.block.qk_norm_over == "all":
        heads, kv_heads = config.num_heads, config.kv_heads
    size = _norm(config, config.channels)
    return count + size * (heads + kv_heads * layer.key.own)


def _norm(config: ModelConfig, size: int) -> int:
    return size * (2 if config.block.norm == "layer" else 1)


def _biases(config: ModelConfig, layer: LayerKV) -> int:
    block, streams = config.block, layer.key.own + layer.value.own
    heads = config.num_heads + config.kv_heads * streams
    hidden = config.d_ff * (1 + block.gated)
    return (
        block.qkv_bias * config.channels * heads
        + block.output_bias * config.d_model
        + block.mlp_bias * (hidden + config.d_model)
    )


def _mixing(config: ModelConfig, kind: Kind, stream: Stream) -> int:
    """Learned weights of one stream: one array of the granularity's size per term."""
    if stream.weights is None:
        return 0
    heads, channels = config.stream_shapes[kind]
    if kind == "key":
        channels //= 2  # one weight for both channels of a rotary pair
    size = {
        "scalar": 1,
        "head": heads,
        "channel": math.prod((heads, channels)),
        "shared_channel": channels,
    }[stream.weights]
    convex = stream.mixing.parameterization == "convex"
    return size * (1 if convex else stream.terms)
