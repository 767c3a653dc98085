"""A step's costs against the costs of one decoded token and of one prompt."""

import numpy as np
import pytest

from fusedkv_jax import costs, presets
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
