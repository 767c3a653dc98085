"""Every compressor on every layout: it serves the layout, or refuses it in one clear line."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import fusedkv_jax as fkv
from fusedkv_jax import compression
from fusedkv_jax.compression import (
    H2O,
    CompressionError,
    DoubleSparsity,
    MiniCache,
    PyramidInfer,
    PyramidKV,
    SnapKV,
    StreamingLLM,
)
from fusedkv_jax.generation.chunked_prefill import PrefillPlan, PromptArrays
from fusedkv_jax.generation.programs import GenerationPrograms
from tests.model import small

B, T, ROOM = 2, 16, 4
COUNT = jnp.array([16, 11], jnp.int32)

# (small budget, a budget as large as the prompt and what is generated)
COMPRESSORS = {
    "snapkv": (SnapKV(budget=6, window=3, kernel=3), SnapKV(budget=T)),
    "pyramidkv": (PyramidKV(budget=6, window=3, beta=4), PyramidKV(budget=T)),
    "pyramidinfer": (PyramidInfer(budget=0.2), PyramidInfer(budget=1)),
    "minicache": (MiniCache(budget=2), MiniCache(budget=T)),
    "double_sparsity": (DoubleSparsity(budget=5), DoubleSparsity(budget=T + ROOM)),
    "streaming_llm": (StreamingLLM(budget=7, sinks=2), StreamingLLM(budget=T + ROOM)),
    "h2o": (H2O(budget=6), H2O(budget=T + ROOM)),
}
ALONE = ("mha", "window_hybrid_mha", "resformer")  # no stream is read by two layers
# Compiling is most of the time: what layouts do not change is tried on these.
WITH_LARGE_BUDGET = ("mha", "fusedkv", "lckv", "window_hybrid")
WITH_CHUNKS = ("mha", "window_hybrid")
SPECS = {**small.SPECS, "window_hybrid_mha": "window_hybrid:window=5,full_every=2,upper=mha"}
SPECS |= {"windowed": "0s4_1s4_2s4_3s4_4s4_5s4_6s4_7s4"}


def refusal(name, layout, geometry):
    """What a refusal says, or None where the compressor serves the layout."""
    if geometry == "mla" and name != "streaming_llm":
        return "mla caches one latent"
    if layout == "lckv" and name not in ("snapkv", "pyramidkv", "streaming_llm"):
        return "cyclic layout"
    if name == "minicache":
        if layout == "windowed" or layout == "window_hybrid_mha":
            return "no two adjacent layers"
        return None if layout in ALONE else "shares its keys or values"
    if name == "pyramidinfer":
        if layout in ("windowed", "window_hybrid_mha", "window_hybrid"):
            return "window of layer 0"
        return None if layout == "mha" else "reads streams of other layers"
    dense = ("svformer", "svformer_half", "dense_fusion", "window_hybrid", "windowed")
    if name == "double_sparsity" and layout in dense:
        return "reading would stay dense"
    return None


def test_every_compressor_and_layout_is_in_the_matrix():
    assert set(COMPRESSORS) == set(compression.names())
    assert set(small.SPECS) == set(fkv.layouts.names())


@pytest.mark.parametrize("geometry", ["gqa", "mla"])
@pytest.mark.parametrize("layout", SPECS)
@pytest.mark.parametrize("name", COMPRESSORS)
def test_what_cannot_be_served_is_refused(name, layout, geometry):
    try:
        config = small.config(SPECS[layout], geometry)
    except ValueError:
        pytest.skip("no such model")
    expected = refusal(name, layout, geometry)
    for compressor in COMPRESSORS[name]:
        if expected is None:
            compressor.check(config)
            continue
        with pytest.raises(CompressionError) as error:
            compressor.check(config)
        assert expected in str(error.value) and "\n" not in str(error.value)
        assert "use" in str(error.value) or "lower" in str(error.value)  # the fix


def served():
    """Every compressor on the layouts that differ most, and every layout with one compressor."""
    cases = []
    for index, layout in enumerate(SPECS):
        names = [name for name in COMPRESSORS if refusal(name, layout, "gqa") is None]
        turn = names[index % len(names)]
        for name in names if layout in WITH_LARGE_BUDGET else [turn]:
            quick = layout == "fusedkv" and name == "snapkv"
            marks = () if quick else pytest.mark.slow
            cases.append(pytest.param(name, layout, id=f"{name}-{layout}", marks=marks))
    return cases


@functools.cache
def plain(layout):
    """A model and what it gives without compression."""
    model = small.decoder(small.config(SPECS[layout]))
    logits, cache = fkv.prefill(model, small.tokens(B, T), COUNT, empty(model))
    size = cache.nbytes
    later, _ = fkv.decode_step(model, jnp.argmax(logits, -1).astype(jnp.int32), cache)
    return model, logits, later, size


def empty(model, dtype=None):
    return fkv.KVCache.create(model.config, batch_size=B, max_length=T + ROOM, dtype=dtype)


@pytest.mark.parametrize("name, layout", served())
def test_large_budgets_change_nothing_and_small_ones_shrink_the_arrays(name, layout):
    model, logits, later, size = plain(layout)
    token = jnp.argmax(logits, -1).astype(jnp.int32)
    small_budget, large_budget = COMPRESSORS[name]

    if layout in WITH_LARGE_BUDGET:
        found, cache = fkv.prefill(
            model, small.tokens(B, T), COUNT, empty(model), compression=large_budget
        )
        np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)
        found, cache = fkv.decode_step(model, token, cache)
        np.testing.assert_allclose(found, later, rtol=1e-5, atol=1e-5)

    found, cache = fkv.prefill(
        model, small.tokens(B, T), COUNT, empty(model), compression=small_budget
    )
    if layout in WITH_CHUNKS:
        programs = GenerationPrograms.of(
            model, fkv.generation.EngineSettings(compression=small_budget)
        )
        prompts = PromptArrays(np.asarray(small.tokens(B, T)), np.asarray(COUNT))
        chunked = programs.prefill(prompts, empty(model), PrefillPlan(width=5)).logits
        np.testing.assert_allclose(chunked, found, atol=1e-4)
    idle = layout == "windowed" or name == "pyramidinfer"  # nothing to do; only for long prompts
    if name == "double_sparsity":
        assert cache.nbytes > size
    elif not idle:
        assert cache.nbytes < size
    found, cache = fkv.decode_step(model, token, cache)
    difference = np.abs(np.asarray(found) - later).max(-1)
    assert np.isfinite(difference).all()
    assert (difference < 1e-5).all() if idle else difference[0] > 1e-3
