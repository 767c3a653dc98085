"""The kernels lower for TPU anywhere, and libtpu compiles them for chips that are not there."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import Pages, tpu
from pallas_kernels.masks import Mask
from pallas_kernels.sources import SAVED
from pallas_kernels.tpu import chips
from tests.pallas_kernels.cases import call_of
from tests.pallas_kernels.tpu import calls

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu"
)


@pytest.mark.parametrize(
    "made",
    [
        lambda: calls.training("v5e"),
        lambda: calls.training("v6e"),
        lambda: calls.training("v5e", size=80, softcap=5.0, dtype="float32"),
        lambda: calls.decoding("v5e"),
        lambda: calls.decoding("v6e", ring=True, sources=1),
        lambda: calls.paging("tpu7x", "float8_e4m3fn"),
        lambda: calls.stepping("v5e"),
    ],
)
def test_lowers_for_tpu(made):
    call, specs = made()
    text = jax.jit(call).trace(*specs).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text


def compiled(chip, made):
    call, specs = made
    return tpu.compile_for(chip, call, *specs).memory_analysis()


@needs_libtpu
def test_compiles_for_v5e():
    compiled("v5e", calls.training("v5e", length=128))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", chips.CHIPS)
def test_training_compiles_for(chip):
    compiled(chip, calls.training(chip, length=256))
    compiled(chip, calls.training(chip, length=256, size=96, sources=3, softcap=9.0))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", chips.CHIPS)
def test_decoding_compiles_and_reads_the_cache_in_place_for(chip):
    """No temporary of the size of one source, stored or rebuilt, whatever the storage.

    What there is are positions, padded to whole tiles; some chips hold them in VMEM.
    """
    source = 4 * 4096 * 8 * 128  # bytes in 8 bits
    stored = chips.CHIPS[chip].storage[0]
    made = [calls.decoding(chip), calls.decoding(chip, ring=True), calls.paging(chip, stored)]
    for call in made:
        assert compiled(chip, call).temp_size_in_bytes < source


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", chips.CHIPS)
def test_a_mixed_step_compiles_and_reads_pages_in_place_for(chip):
    """Heads of 128, 64 and 80 channels, and 8-bit pages; no temporary of the size of a stream."""
    stored = chips.CHIPS[chip].storage[0]
    for options in ({}, {"dtype": stored}, {"size": 64}, {"size": 80, "heads": (16, 16)}):
        call, specs = calls.stepping(chip, **options)
        pool = specs[0][0]
        assert (
            compiled(chip, (call, specs)).temp_size_in_bytes < pool.size * pool.dtype.itemsize / 2
        )


@pytest.mark.parametrize(
    ("chip", "dtype"),
    [
        ("v5e", "float8_e4m3fn"),
        ("tpu7x", "int8"),
        ("v5p", "float8_e5m2"),
        ("v5e", "float16"),
    ],
)
def test_storage_that_a_chip_does_not_serve_is_refused_by_name(chip, dtype):
    for form in (calls.decoding, calls.paging):
        call, specs = form(chip, dtype)
        with pytest.raises(NotImplementedError, match=f"{dtype} is not served on {chip}; use"):
            jax.eval_shape(call, *specs)


def test_refusals_name_the_reason():
    call, specs = calls.paging("v5e", size=80)
    with pytest.raises(NotImplementedError, match="records of a multiple of 128"):
        jax.eval_shape(call, *specs)
    call, specs = calls.training(None)
    with pytest.raises(NotImplementedError, match="the device is 'cpu'"):
        jax.eval_shape(call, *specs)


def test_lists_and_tables_beyond_scalar_memory_are_refused():
    """While tracing, so that XLA serves the call; the compiler would end the program."""
    call, specs = calls.paging("v5e", page_size=16)
    q, pages, _, lengths, *weights = specs
    wide = calls.integers(q.shape[0], 2**18 // q.shape[0])
    with pytest.raises(NotImplementedError, match="page table .* scalar memory; use larger pages"):
        jax.eval_shape(call, q, pages, wide, lengths, *weights)
    call, specs = calls.decoding("v5e")
    q, keys, *rest = specs
    long = tuple(calls.spec(8, 2**17, 1, 128) for _ in keys)
    weights = calls.floats(len(keys), 1, 128)
    mask = Mask(causal=True, kv_lengths=calls.integers(8))
    with pytest.raises(NotImplementedError, match="scalar memory holds 245760; use a smaller"):
        jax.eval_shape(call, calls.spec(8, 2**17, 8, 128), long, long, weights, weights, mask)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", chips.CHIPS)
def test_a_table_that_nearly_fills_scalar_memory_compiles_for(chip):
    call, specs = calls.paging(chip, page_size=16)
    q, pages, _, lengths, *weights = specs
    width = 225_000 // q.shape[0]
    compiled(chip, (call, (q, pages, calls.integers(q.shape[0], width), lengths, *weights)))


@needs_libtpu
def test_a_write_leaves_the_other_pages_where_they_are():
    """No copy of all pages, in whatever order of axes, before or after the write."""
    fields = {"num_keys": 2, "num_values": 2, "key_size": 128, "value_size": 128}
    pages = jax.eval_shape(
        lambda: Pages.create(num_pages=256, page_size=16, num_kv_heads=4, **fields)
    )
    token = jax.ShapeDtypeStruct((4, 1, 4, 128), jnp.bfloat16)
    table, position = (jax.ShapeDtypeStruct((4, n), jnp.int32) for n in (16, 1))

    def write(pages, token, table, position):
        return pages.write((token, None), (token, None), table, position)

    compiled = tpu.compile_for("v5e", write, pages, token, table, position, donate=(0,))
    assert compiled.memory_analysis().temp_size_in_bytes < pages.nbytes / 4


@needs_libtpu
def test_a_policy_that_saves_results_by_name_runs_the_kernel_once():
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED)

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(q, key):
        return tpu.attention(call_of((q, (key,), (key,), None, None)), chip="v5e")[0]

    gradient = jax.value_and_grad(lambda *x: layer(*x).astype(jnp.float32).sum())
    x = calls.spec(1, 128, 2, 128)
    text = tpu.compile_for("v5e", gradient, x, x).as_text() or ""
    kernels = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert sum("tile_forward" in line.partition("=")[0] for line in kernels) == 1
    assert len(kernels) == 2
