"""FLOPs of a prompt, of a decoded token and of training.

Conventions: a multiply-add is 2 FLOPs. Counted are matrix products, attention's two products
over the visible keys only, and the mixing of streams (J terms: J multiplications and J - 1
additions per element, over the keys that are read). Not counted are the embedding's gather,
norms, rotations, softmax, activations and what rematerialization computes twice.
"""

from __future__ import annotations

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.costs.arguments import check
from fusedkv_jax.costs.parameters import matrices
from fusedkv_jax.costs.visible import visible_to_all, visible_to_any, visible_to_last
from fusedkv_jax.layouts import KINDS


def prefill_flops(config: ModelConfig, length: int) -> int:
    """FLOPs of one prompt of `length` tokens, up to the logits of its last token.

    All tokens pass through `prefill_depth` layers, the last token alone through those above,
    where it costs what a decoded token does. A cyclic layout iterates each of its groups as often
    as its parallel form has passes, or as the prompt has tokens if those are fewer.
    """
    check(config, length=length)
    layout = config.kv_layout
    iterations = min(sum(layout.passes), length)
    total = _head(config)
    for i in range(layout.num_layers):
        if i >= layout.prefill_depth:
            total += last_row_flops(config, i, length)
        else:
            passes = iterations if layout.is_iterated(i) else 1
            total += passes * _layer_all_rows(config, i, length)
    return total


def decode_flops(config: ModelConfig, length: int) -> int:
    """FLOPs of decoding one token of one sequence.

    Args:
        config: the model.
        length: tokens in the cache, the decoded one included.
    """
    check(config, length=length)
    layers = range(config.num_layers)
    return _head(config) + sum(last_row_flops(config, i, length) for i in layers)


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs per token of a training step on sequences of `length` tokens.

    Forward and backward, which costs twice as much: model FLOPs, as MFU wants them. A cyclic
    layout goes forward through each pass once and backward through the last ones only.
    """
    check(config, length=length)
    layout = config.kv_layout
    without, with_gradient = layout.passes
    total = 3 * length * _head(config)
    for i in range(layout.num_layers):
        forward = _layer_all_rows(config, i, length)
        if layout.is_iterated(i):
            total += (without + with_gradient + 2 * with_gradient) * forward
        else:
            total += 3 * forward
    return total / length


def _head(config: ModelConfig) -> int:
    return 2 * config.d_model * config.vocab_size


def _layer_all_rows(config: ModelConfig, i: int, length: int) -> int:
    """One layer over all tokens of a sequence."""
    layout = config.kv_layout
    per_key = config.geometry.flops_per_key(single=False)
    return (
        length * (_projections(config, i) + _residual(config, i))
        + per_key * visible_to_all(layout, i, length)
        + fusion_flops(config, i, visible_to_any(layout, i, length))
    )


def last_row_flops(config: ModelConfig, i: int, length: int) -> int:
    """One layer over the last of `length` tokens.

    MLA attends in the latent space: its up-projection is absorbed, at the price of one token's.
    """
    visible = visible_to_last(config.kv_layout, i, length)
    per_key = config.geometry.flops_per_key(single=True)
    return (
        _projections(config, i)
        + _residual(config, i)
        + per_key * visible
        + fusion_flops(config, i, visible)
    )


def _projections(config: ModelConfig, i: int) -> int:
    """Matrix products of one layer for one token."""
    return 2 * sum(matrices(config, config.kv_layout.layers[i]).values())


def _residual(config: ModelConfig, i: int) -> int:
    """Mixing sources into the layer's own streams, for one token, before they are cached."""
    return _mixing(config, i, residual=True)


def fusion_flops(config: ModelConfig, i: int, keys: int) -> int:
    """Weighting cached streams of other layers, once for each key that is read."""
    return keys * _mixing(config, i, residual=False)


def _mixing(config: ModelConfig, i: int, *, residual: bool) -> int:
    total = 0
    for kind in KINDS:
        stream = config.kv_layout.layers[i].stream(kind)
        if stream.weights is not None and stream.is_residual == residual:
            heads, channels = config.stream_shapes[kind]
            total += (2 * stream.terms - 1) * heads * channels
    return total
