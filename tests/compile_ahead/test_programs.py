"""What is known about a program before it is compiled."""

import jax
import numpy as np
import pytest

from experiments.common.paper import inference
from fusedkv_jax import costs
from fusedkv_jax.compile_ahead import programs
from fusedkv_jax.config import MLAConfig, ModelConfig
from fusedkv_jax.sharding import MeshConfig, MeshError, make_mesh

FIELDS = dict(vocab_size=64, num_layers=4, d_model=64, num_heads=8, head_dim=16, d_ff=64)
MLA = MLAConfig(kv_lora_rank=16, nope_dim=8, rope_dim=8, v_dim=16)


@pytest.mark.parametrize(
    ("fields", "mesh", "rows", "devices"),
    [
        ({}, {"data": 4, "tensor": 2}, 8, 8),
        ({}, {"data": 8}, 8, 8),
        ({}, {"data": 8}, 1, 1),  # a row is whole on every device
        ({}, {"data": 8}, 3, 1),
        ({}, {"context": 4}, 4, 1),  # and so are the tokens that it attends to
        ({"num_kv_heads": 2}, {"data": 2, "tensor": 4}, 4, 4),  # each device cuts out one head
        ({"num_kv_heads": 1}, {"tensor": 8}, 4, 1),
        ({"mla": MLA}, {"data": 2, "tensor": 4}, 4, 2),  # one latent for all heads
    ],
)
def test_a_device_reads_what_is_not_split_as_a_whole(fields, mesh, rows, devices):
    """`devices`: over how many the reads of all rows are split."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    config = ModelConfig(**FIELDS, **fields)
    used = jax.devices()[: int(np.prod(list(mesh.values())))]
    made = programs.decode(config, make_mesh(MeshConfig(**mesh), used), rows, 64)
    reads = rows * costs.decode_cache_reads(config, 64, config.dtype)
    assert made.cache_reads == pytest.approx(reads / devices, rel=0.05)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("make", [programs.prefill, programs.decode])
@pytest.mark.parametrize(("rows", "length"), [(0, 8), (-1, 8), (1.5, 8), (1, 0)])
def test_sizes_that_cannot_be(make, rows, length):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with pytest.raises(MeshError, match="(rows|length)=.*; use a whole number of at least 1"):
        make(ModelConfig(**FIELDS), mesh, rows, length)


@pytest.mark.parametrize(
    ("rows", "length", "message"),
    [
        (3, 64, "rows=3 do not divide over data=4 x fsdp=1; use a multiple of 4"),
        (4, 63, "length=63 does not divide over context=2; use a multiple of it"),
    ],
)
def test_prompts_divide_over_the_mesh(rows, length, message):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    mesh = make_mesh(MeshConfig(data=4, context=2), jax.devices()[:8])
    with pytest.raises(MeshError, match=message):
        programs.prefill(ModelConfig(**FIELDS), mesh, rows, length)


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_rows_of_the_paper_are_those_that_are_asked_for(name):
    config, one = ModelConfig(**FIELDS), jax.devices()[:1]
    assert inference(name, config, one, tensor=1, rows=None, length=8).tokens in (1, 8)
    with pytest.raises(MeshError, match="rows=0; use a whole number"):
        inference(name, config, one, tensor=1, rows=0, length=8)


def test_a_prompt_is_computed_in_the_layers_that_run():
    """The upper half of a window hybrid's layers computes nothing for it."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    windows = programs.prefill(ModelConfig(**FIELDS, layout="0s8_1s8_1_1"), mesh, 1, 64)
    whole = programs.prefill(ModelConfig(**FIELDS, layout="0_1_1s8_1s8"), mesh, 1, 64)
    causal = (64 + 1) / (2 * 64)
    assert whole.visible == pytest.approx(causal)
    assert windows.visible == pytest.approx((8 * 9 / 2 + 56 * 8) / 64**2)
