"""A step's costs against the costs of one decoded token and of one prompt."""

import jax.numpy as jnp
import numpy as np
import pytest

from fusedkv_jax import costs, presets
from fusedkv_jax.cache.paged import PagedStore
from fusedkv_jax.costs import StepCosts

LAYOUTS = ("mha", "cla", "yoco", "fusedkv", "fusedkv_lite", "resformer")


def _config(layout: str, **changes):
    return presets.get("332m", layout=layout, num_layers=8, **changes)


def _work(step: StepCosts, *rows: tuple[int, int, bool]):
    starts, counts, sampled = (np.array(column) for column in zip(*rows, strict=True))
    return step.work(starts, counts, sampled)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 700, 5000])
def test_a_step_of_one_row_is_a_decoded_token(layout, length):
    config = _config(layout)
    work = _work(StepCosts.of(config), (length - 1, 1, True))
    assert work.flops == costs.decode_flops(config, length)
    written = costs.cache_bytes_per_token(config)
    assert work.cache_bytes == costs.decode_cache_reads(config, length) + written


@pytest.mark.parametrize("layout", ["mha", "cla", "yoco"])
def test_chunks_add_up_to_a_prompt(layout):
    config = _config(layout)
    step = StepCosts.of(config)
    chunks = [(0, 300, False), (300, 500, False), (800, 200, True)]
    total = sum(_work(step, chunk).flops for chunk in chunks)
    assert total == costs.prefill_flops(config, 1000)
    assert _work(step, *chunks).flops == total


@pytest.mark.parametrize("layout", ["window_hybrid:window=128,rebuild=window", "0_1_f0+1x5_7"])
def test_chunks_add_up_to_a_prompt_and_the_keys_that_are_fused_again(layout):
    """Fused layers below one that caches: every chunk fuses the keys that its queries see."""
    config = _config(layout)
    fused = [layer for layer in config.kv_layout.layers if layer.key.weights]
    assert fused and config.kv_layout.prefill_depth == 8
    step, prompt = StepCosts.of(config), costs.prefill_flops(config, 1000)
    assert _work(step, (0, 1000, True)).flops == prompt
    chunks = [(0, 300, False), (300, 500, False), (800, 200, True)]
    total = sum(_work(step, chunk).flops for chunk in chunks)
    seen_before = 127 + 127 if fused[0].window else 300 + 800
    assert fused[0].window in (None, 128)
    # Two products and a sum, in each channel of a key and of a value.
    fusion = len(fused) * 3 * 2 * config.kv_heads * config.channels
    assert total == prompt + seen_before * fusion
    assert _work(step, *chunks).flops == total


def test_windows_bound_what_is_read():
    windowed = _config("yoco:window=128", num_kv_heads=4)
    step = StepCosts.of(windowed)
    near, far = (_work(step, (length, 1, True)) for length in (4000, 8000))
    plain = StepCosts.of(_config("yoco", num_kv_heads=4))
    near_plain, far_plain = (_work(plain, (length, 1, True)) for length in (4000, 8000))
    assert far.cache_bytes - near.cache_bytes < far_plain.cache_bytes - near_plain.cache_bytes
    chunks = [(0, 300, False), (300, 500, False), (800, 200, True)]
    total = sum(_work(step, chunk).flops for chunk in chunks)
    assert total == costs.prefill_flops(windowed, 1000)


def test_upper_layers_cost_nothing_before_the_last_chunk():
    step = StepCosts.of(_config("fusedkv"))
    early, last = _work(step, (0, 64, False)), _work(step, (0, 64, True))
    assert last.weight_bytes > 1.5 * early.weight_bytes
    row = _work(step, (63, 1, True)).flops - _work(step, (63, 1, False)).flops
    assert last.flops - early.flops == row  # one row, whatever the chunk


def test_cyclic_layouts_are_refused():
    with pytest.raises(ValueError, match="cyclic"):
        StepCosts.of(_config("lckv"))


@pytest.mark.parametrize("layout", ["mha", "yoco:window=128"])
def test_int4_is_refused_because_pages_do_not_hold_it(layout):
    with pytest.raises(ValueError, match="pages do not hold int4; use int8"):
        StepCosts.of(_config(layout), cache_dtype="int4")
    config = _config("mha")
    with pytest.raises(ValueError, match="int4"):
        PagedStore.create(config, num_pages=1, page_size=8, dtype="int4")


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("dtype", ["bf16", "int4", "float64", "float8_e5m2", None, 5])
def test_dtypes_of_parameters(dtype):
    with pytest.raises(ValueError, match="choose bfloat16, float32, float16, int8") as error:
        StepCosts.of(_config("mha"), dtype, "int8")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), (jnp.float16, 2), ("int8", 1)])
def test_bytes_of_parameters(dtype, size):
    config = _config("mha")
    step = StepCosts.of(config, dtype)
    assert step.parameter_bytes == size * costs.parameter_count(config)
    assert step.cache_bytes_per_token == costs.cache_bytes_per_token(config, dtype)


def test_unknown_dtypes_of_the_cache_are_named():
    with pytest.raises(ValueError, match="dtype='int7' is no dtype; use"):
        StepCosts.of(_config("mha"), cache_dtype="int7")
