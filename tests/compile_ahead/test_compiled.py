"""Programs that libtpu really compiled, on no TPU."""

import importlib.util
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from experiments.compile_for_tpu import paper_run
from fusedkv_jax.compile_ahead import programs, report, search
from fusedkv_jax.compile_ahead.chips import Slice
from fusedkv_jax.compile_ahead.hlo import Module
from fusedkv_jax.sharding import MeshConfig, MeshError, make_mesh

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu"
)


def devices(name):
    from pallas_kernels.tpu.topology import slice_devices

    return slice_devices(name)


def test_the_best_settings_divide_the_model_and_lie_along_the_slice():
    config, place = paper_run("4b", "fusedkv"), Slice.parse("v5p:8x8x8")
    found = search.candidates(config, place, devices(place.name))
    assert len({(c.remat, c.mesh.context, c.mesh.tensor) for c in found}) == len(found) > 3
    for candidate in found:
        mesh = make_mesh(candidate.mesh, devices(place.name))
        rows = mesh.shape["data"] * mesh.shape["fsdp"] * candidate.grad_accumulation
        assert mesh.size == 512 and config.data.batch_size % rows == 0
        assert candidate.memory < place.chip.hbm
    assert found[0].seconds == min(c.seconds for c in found)


def test_a_mesh_across_the_axes_of_a_slice_is_refused_in_words():
    with pytest.raises(MeshError, match="data=4 x fsdp=128 x .* not lie along the axes 8x8x8"):
        make_mesh(MeshConfig(data=4, fsdp=128), devices("v5p:8x8x8"))


def test_the_peak_is_that_of_the_compilers_memory_report(fresh_compilation, tmp_path):
    def step(x):
        def loss(x):
            for _ in range(3):
                x, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c) + c, None), x, None, length=8)
            return x.sum()

        return jax.grad(loss)(x)

    # What each of the three loops writes lives at another time, and adds up to more than fits.
    place = Slice.parse("v5e:1x1")
    put = jax.sharding.SingleDeviceSharding(devices(place.name)[0])
    x = jax.ShapeDtypeStruct((4096, 20480), jnp.float32, sharding=put)
    dump = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True}
    compiled = jax.jit(step).lower(x).compile(compiler_options=dump)
    memory: Any = compiled.memory_analysis()
    (path,) = tmp_path.glob("*memory-usage-report.txt")
    found = re.search(r"color=0\)\nTotal bytes: (\d+)", path.read_text())
    assert found is not None
    reported = int(found.group(1))
    code = memory.generated_code_size_in_bytes
    assert report.peak_bytes(memory) - code == pytest.approx(reported, rel=0.001)
    assert reported < place.chip.hbm < memory.temp_size_in_bytes

    # The search takes the compiler's word for what fits.
    lowered, mesh = SimpleNamespace(compile=lambda: compiled), jax.make_mesh((1,), ("data",))
    program = programs.Program("train", lowered, mesh, 1, {}, 1.0, 1.0, "")
    assert report.compile_program(program, place)[0] is compiled


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("required for HLO temporaries (22.50G) exceeds available HBM (15.75G)", 22.5 * 2**30),
        ("Used 1.5T of 15.75G hbm. Exceeded hbm capacity by 1.48T.", 1.5 * 2**40),
        ("INTERNAL: something else", None),
    ],
)
def test_the_compilers_words_for_too_much(message, needed):
    assert report.needed_bytes(message) == needed


@pytest.mark.slow
def test_the_4b_step_of_4m_tokens_fits_512_chips_and_holds_no_logits_and_no_scores(
    fresh_compilation,
):
    place = Slice.parse("v5p:8x8x8")
    config = paper_run("4b", "fusedkv")
    best = search.candidates(config, place, devices(place.name))[0]
    config = best.apply(config)
    mesh = make_mesh(config.mesh, devices(place.name))
    program = programs.train(config, mesh)
    compiled, _ = report.compile_program(program, place)
    found = report.analyze(program, place, compiled, 0.0)
    assert found.peak < 0.9 * place.chip.hbm and found.tokens == 512 * 8192
    # No layer is left to plain XLA, and none is computed less than forward and backward.
    assert found.kernels["tile_backward"] % 36 == 0 < found.kernels["tile_backward"]
    places = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.data.batch_size // (places * config.train.grad_accumulation)
    length, vocabulary = config.data.seq_len, config.model.vocab_size // mesh.shape["tensor"]
    for instruction, shape in Module(compiled.as_text()).arrays():
        whole = any(size and size % vocabulary == 0 for size in shape.dims)
        assert not (whole and shape.elements >= rows * length * vocabulary), instruction
        assert shape.dims.count(length) < 2, instruction
