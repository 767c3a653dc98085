"""A model taken apart for programs that are called often."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import graphlib

import fusedkv_jax as fkv
from fusedkv_jax.model.structure import split_for_calls

CONFIG = fkv.ModelConfig(
    vocab_size=32, num_layers=4, d_model=16, num_heads=2, d_ff=32, max_length=32
)
TOKENS = jnp.arange(6)[None]


@functools.partial(jax.jit, static_argnames="graph")
def logits(graph, params, tokens):
    return nnx.merge(graph, params)(tokens)


def test_together_they_are_the_model():
    model = fkv.Decoder(CONFIG, rngs=nnx.Rngs(0))
    assert jnp.array_equal(logits(*split_for_calls(model), TOKENS), model(TOKENS))


def test_calls_hash_no_nodes(monkeypatch):
    parts = split_for_calls(fkv.Decoder(CONFIG, rngs=nnx.Rngs(0)))
    logits(*parts, TOKENS)

    def refuse(self):
        raise AssertionError("a node was hashed")

    for node in (graphlib.NodeDef, graphlib.VariableDef):
        monkeypatch.setattr(node, "__hash__", refuse)
    logits(*parts, TOKENS)


def test_models_of_one_structure_share_programs():
    first, second = (split_for_calls(fkv.Decoder(CONFIG, rngs=nnx.Rngs(seed))) for seed in range(2))
    other = split_for_calls(
        fkv.Decoder(dataclasses.replace(CONFIG, layout="yoco"), rngs=nnx.Rngs(0))
    )
    assert first[0] == second[0] and hash(first[0]) == hash(second[0])
    assert first[0] != other[0]
    program = jax.jit(logits.__wrapped__, static_argnames="graph")
    for parts in (first, second):
        program(*parts, TOKENS)
    assert program._cache_size() == 1
