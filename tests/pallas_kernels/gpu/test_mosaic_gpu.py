"""The Mosaic GPU kernel in Pallas' interpreter, which looks for races, and compiled for an H100."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import devices, mosaic_gpu
from pallas_kernels.gpu import static
from pallas_kernels.mosaic_gpu import static as compiled
from tests.oracles import attention as oracle
from tests.pallas_kernels.attention_cases import AttentionCases
from tests.pallas_kernels.cases import I32, as_jax, call_of, draw, poison
from tests.pallas_kernels.gpu.mosaic_gpu import H100, INTERPRETS, NEEDS, MosaicGpu

interpreted = pytest.mark.skipif(not INTERPRETS, reason=NEEDS)
# Of NumPy in the interpreter: products of what is then masked.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def no_races():
    """Fails the test if warpgroups met in shared memory without a barrier between them."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as interpreter  # private

    yield
    try:
        races = interpreter._races
        assert races is None or not races.races_found
    finally:
        interpreter.reset_gpu_interpret_mode_state()


# Several blocks and tiles, which a short case has not: tiles are loaded over used ones.
LONG = {
    "long_ragged": ((1, 70, 300, 2, 1, 128, 128, 2, 2), {"kv_lengths": I32([290])}),
    "long": ((1, 200, 330, 2, 1, 64, 64, 2, 2), {}),
    "long_plain": ((1, 150, 520, 2, 1, 128, 128, 1, 1), {"causal": False}),
    "long_rows": ((2, 140, 460, 1, 1, 128, 128, 2, 1), {"kv_lengths": I32([450, 141])}),
    "long_window": ((1, 300, 700, 1, 1, 64, 64, 1, 2), {"window": 130, "softcap": 2.0}),
}


@interpreted
@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x == "long_ragged" else pytest.mark.slow) for x in LONG],
)
def test_a_long_call_matches_the_definition(name):
    shape, options = LONG[name]
    arguments, cotangents = draw(name, shape)
    test = TestMosaicGpu()
    found = jax.jit(lambda *x: test.attend(x, options))(*poison(arguments, options))
    test.compare((*found, None), oracle.attention(*arguments, options, *cotangents))


@interpreted
@pytest.mark.slow
@pytest.mark.usefixtures("no_races")
class TestMosaicGpu(MosaicGpu, AttentionCases):
    examples = 3


REFUSED = {
    "float32 queries": ((1, 9, 9, 2, 1, 64, 64, 1, 1), "float32", {}),
    "head sizes of 96": ((1, 9, 9, 2, 1, 96, 96, 1, 1), "bfloat16", {}),
    "head sizes of 64, 128": ((1, 9, 9, 2, 1, 64, 128, 1, 1), "bfloat16", {}),
    "do not fit in shared memory": ((1, 9, 9, 2, 1, 128, 128, 4, 4), "bfloat16", {}),
    "scale of -1": ((1, 9, 9, 2, 1, 64, 64, 1, 1), "bfloat16", {"scale": -1.0}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_served_is_refused_in_one_line(reason):
    shape, dtype, options = REFUSED[reason]
    (q, keys, values, *weights), _ = draw("refused", shape)
    q, keys, values = jax.tree.map(lambda x: jnp.asarray(x, dtype), (q, keys, values))
    call = call_of((q, keys, values, *weights), options)
    with pytest.raises(NotImplementedError, match=reason) as refusal:
        mosaic_gpu.attention(call, device=H100)
    assert "\n" not in str(refusal.value)


def test_other_devices_are_refused():
    arguments = as_jax(draw("device", (1, 9, 9, 2, 1, 64, 64, 1, 1))[0])
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        mosaic_gpu.attention(call_of(arguments), device=static.target("b200"))
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        pallas_kernels.attention(*arguments, implementation="mosaic_gpu")


needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs jax-cuda13-plugin: pip install -e '.[gpu-compile]'",
)


@needs_plugin
@pytest.mark.usefixtures("fresh_compilation")
@pytest.mark.parametrize(
    "workload",
    [
        pytest.param(x, marks=() if x.name == "training, fused H=128" else pytest.mark.slow)
        for x in compiled.CALLS
        if x.sources <= 2 and x.dtype == "bfloat16"
    ],
    ids=lambda x: x.name,
)
def test_compiles_for_hopper_with_its_own_instructions_and_no_spills(workload):
    line = compiled.line(workload)
    assert line["spill"] == 0 and not line["serialized"], line
    assert line["wgmma"] > 0 and line["tma"] > 0, line
    assert line["shared"] <= devices.shared_memory(90), line
