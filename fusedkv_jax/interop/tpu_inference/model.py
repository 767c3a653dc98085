"""The class that tpu-inference runs: one of our decoders over its pages, with its attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.interop.huggingface import load_huggingface
from fusedkv_jax.interop.tpu_inference import folding
from fusedkv_jax.layouts import KINDS, runs
from fusedkv_jax.model import Decoder
from fusedkv_jax.model.attention import Attention
from fusedkv_jax.model.block import Block
from fusedkv_jax.model.layers import add_bias
from fusedkv_jax.model.mixing import mix
from fusedkv_jax.model.projection import project


class FusedKVForCausalLM(nnx.Module):
    """A decoder under tpu-inference's interface: (kv_caches, input_ids, attention_metadata).

    All rows pass through all layers: its runner picks the rows that are sampled only afterwards.
    Weights lie whole on each device, so a mesh of one device is taken.

    Args:
        vllm_config: vLLM's configuration; the model folder's `config.json` is ours.
        rng_key: unused; weights are loaded.
        mesh: of the runner.

    Raises:
        ConfigError: the layout cannot be folded.
        ValueError: a mesh of several devices.
    """

    def __init__(self, vllm_config: Any, rng_key: jax.Array, mesh: Any):
        del rng_key
        if mesh is not None and mesh.size > 1:
            raise ValueError(
                f"the mesh has {mesh.size} devices; our models take one under tpu-inference, so"
                " start a replica for each (tensor_parallel_size=1)"
            )
        settings = vllm_config.model_config
        dtype = jnp.dtype(settings.dtype).name
        config = ModelConfig.from_dict(settings.hf_config.fusedkv)
        config = config.replace(dtype=dtype, param_dtype=dtype, scan_layers=False)
        self.fold, self.mesh, self.folder = folding.fold(config), mesh, str(settings.model)
        self.decoder = Decoder(config, rngs=nnx.Rngs(0))

    def load_weights(self, rng_key: jax.Array) -> None:
        """Read the weights of the model folder."""
        del rng_key
        config = self.decoder.config
        loaded = load_huggingface(self.folder, config=config)
        nnx.update(self.decoder, nnx.state(loaded))

    def compute_logits(self, hidden_states: jax.Array) -> jax.Array:
        """[T, D] -> [T, V], float32."""
        return self.decoder.logits(hidden_states)

    def __call__(
        self,
        kv_caches: list[jax.Array],
        input_ids: jax.Array,
        attention_metadata: Any,
        _input_embeds: Any = None,
        _input_positions: Any = None,
        _layer_name_to_kv_cache: Any = None,
        *_: Any,
    ) -> tuple[list[jax.Array], jax.Array, list[jax.Array], None]:
        """A step: the tokens of all requests in one row.

        Args:
            kv_caches: pages of each record, updated.
            input_ids: int32 [T].
            attention_metadata: positions of the tokens, page tables and lengths.

        Returns:
            The caches, final hidden states [T, D], no auxiliary ones, no experts.
        """
        decoder, places = self.decoder, dict(_layer_name_to_kv_cache or ())
        config, weights = decoder.config, decoder.mixing()
        x = decoder.embed(input_ids[None])
        rotations = decoder.rotation(attention_metadata.input_positions[None])
        streams: dict[Any, jax.Array] = {}
        for i, block in enumerate(_blocks(decoder)):
            rotation = rotations
            if len(config.rope_kinds) > 1:
                kind = config.rope_kinds.index(config.layer_ropes[i])
                rotation = rotations[0][kind], rotations[1][kind]
            q, own = block.project(x, rotation)
            for kind, tokens in own.items():
                stream = config.kv_layout.layers[i].stream(kind)
                if stream.is_residual:
                    terms = [streams[kind, j] for j in stream.sources]
                    tokens = mix(weights[kind, i], [*terms, tokens])
                streams[kind, i] = tokens
            source = self.fold.reads[i]
            place = places.get(f"layer.{i}", source)
            kv_caches[place], out = self._attend(
                kv_caches[place], q[0], i, streams, weights, attention_metadata
            )
            attention = block.attention
            assert isinstance(attention, Attention)  # latents are refused
            out = project(out[None], attention.o_proj[...], 2)
            x = block.finish(x, add_bias(out, attention.o_bias))
        return kv_caches, decoder.normed(x)[0], [], None

    def _attend(
        self,
        cache: jax.Array,
        q: jax.Array,
        layer: int,
        streams: dict[Any, jax.Array],
        weights: Any,
        metadata: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """The cache, and what `Attention.context` gives, [T, N, H]."""
        config, place = self.decoder.config, self.fold.reads[layer]
        layout, record = config.kv_layout, self.fold.records[place]
        keys, values = (layout.attended(kind, layer) for kind in KINDS)
        factors = [folding.fused_weights(layout, weights, kind, layer) for kind in KINDS]
        size = q.shape[-1]
        q = folding.widened(q, record, keys, factors[0])
        new = [folding.stored(record, kind, streams) for kind in KINDS]
        cache, out = self.attention(
            cache,
            *(_padded(part) for part in (q, *new)),
            metadata,
            self.mesh,
            q.shape[-1],
            sm_scale=size**-0.5,
            update_kv_cache=place == layer,
            attn_logits_soft_cap=config.block.attention_softcap,
        )
        return cache, folding.narrowed(out[..., : q.shape[-1]], record, values, factors[1])

    def attention(self, *arguments: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
        """tpu-inference's own."""
        from tpu_inference.layers.common.attention_interface import attention

        return attention(*arguments, **options)


def _blocks(decoder: Decoder) -> list[Block]:
    """The layers one by one."""
    layers, found = decoder.layers(), {}
    for r, run in enumerate(runs(decoder.config.kv_layout)):
        for place in range(run.period):
            for repeat, number in enumerate(run.layers(place)):
                params = layers.params[r][place]
                own = (
                    params[repeat]
                    if isinstance(params, tuple)
                    else jax.tree.map(lambda leaf, at=repeat: leaf[at], params)
                )
                found[number] = nnx.merge(layers.graphs[r][place], own)
    return [found[number] for number in sorted(found)]


def _padded(x: jax.Array) -> jax.Array:
    """Heads as wide as the pages': 64, or a multiple of 128."""
    size = x.shape[-1]
    missing = 0 if size == 64 else -size % 128
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing)))
