"""A machine without a GPU, or without triton, loses nothing and gets one clear reason."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import gpu, quantize
from pallas_kernels.gpu import device
from tests.pallas_kernels.cases import call_of

X = jnp.ones((1, 4, 2, 16))
needs_no_gpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a CUDA GPU")


@needs_no_gpu
def test_a_machine_without_a_gpu_gets_one_line_that_says_what_to_do():
    with pytest.raises(NotImplementedError, match=r"NVIDIA GPU.*only cpu.*pip install") as error:
        pallas_kernels.attention(X, (X,), (X,), implementation="triton")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("absent", [{"triton"}, {"jax_triton"}, {"triton", "jax_triton"}])
def test_missing_packages_are_named(monkeypatch, absent):
    monkeypatch.setattr(
        device.importlib.util, "find_spec", lambda name: None if name in absent else object()
    )
    with pytest.raises(NotImplementedError) as error:
        device.missing()
    found = str(error.value)
    assert ("jax-triton" in found) == ("jax_triton" in absent)
    assert ("triton" in found.replace("jax-triton", "")) == ("triton" in absent)
    assert "pip install '.[gpu]'" in found and "\n" not in found


def old_gpu(capability):
    return device.GpuTarget(
        kind="an old GPU", cores=80, compute_capability=capability, launch=lambda *_: 1 / 0
    )


@pytest.mark.parametrize("kind, capability", [("float8_e4m3fn", 80), ("float16", 75)])
def test_an_old_gpu_is_told_what_it_lacks(kind, capability):
    source = quantize(X, kind) if kind.startswith("float8") else X.astype(kind)
    with pytest.raises(NotImplementedError, match=f"{kind} sources need compute capability 8"):
        call = call_of((X, (source,), (source,), None, None))
        gpu.attention(call, device=old_gpu(capability))


@pytest.mark.parametrize(
    ("count", "size", "message"), [(5, 16, "5 sources.*at most 4"), (1, 288, "head size 288")]
)
def test_what_the_kernels_do_not_hold_is_refused(count, size, message):
    x, weights = jnp.ones((1, 4, 2, size)), jnp.ones((count, 2, size))
    with pytest.raises(NotImplementedError, match=message):
        call = call_of((x, (x,) * count, (x,), weights, None))
        gpu.attention(call, device=old_gpu(90))


def test_more_rows_than_a_grid_has_are_refused():
    """CUDA's second axis has 65,535 programs; an invalid launch would end the program."""
    x = jax.ShapeDtypeStruct((2**12, 256, 16, 16), jnp.bfloat16)
    call = lambda x: gpu.attention(call_of((x, (x,), (x,), None, None)), device=old_gpu(90))  # noqa: E731
    with pytest.raises(NotImplementedError, match="4096 rows of 16 KV heads .* a smaller batch"):
        jax.eval_shape(call, x)


def test_nothing_imports_triton_before_a_kernel_is_launched():
    program = (
        "import sys, pallas_kernels.gpu; "
        "print(sorted({'triton', 'jax_triton', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
