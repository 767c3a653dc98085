"""How the shared tests reach the Mosaic GPU kernel, on a GPU or in Pallas' interpreter."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as pallas

from pallas_kernels import mosaic_gpu
from pallas_kernels.gpu import static
from tests.pallas_kernels.cases import call_of
from tests.pallas_kernels.implementation import Implementation

H100 = static.target("h100")
INTERPRETS = hasattr(pallas, "InterpretGPUParams")  # jax 0.11
NEEDS = "needs Pallas' interpreter of GPU kernels, jax 0.11 or later, or a Hopper GPU"


def on_hopper() -> bool:
    """This machine has one."""
    device = jax.devices()[0]
    return device.platform == "gpu" and str(device.compute_capability) == "9.0"


def _wider(x, size):
    """Heads filled up with zeros, which change neither scores nor outputs."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


class MosaicGpu(Implementation):
    """Arguments become what the kernel serves: 16 bits, if wider, and heads of 64 or 128."""

    implementation = "mosaic_gpu"
    unsupported = frozenset({"value_size", "gradients"})
    tolerance = 4e-3  # of float16, which the arguments are rounded to

    def attend(self, arguments, options):
        q, keys, values, *weights = arguments
        narrow = q.dtype if q.dtype.itemsize == 2 else jnp.float16
        size = q.shape[-1]
        full = 64 if size <= 64 else 128
        rounded = lambda x: _wider(jnp.asarray(x), full).astype(narrow)  # noqa: E731
        weights = [None if x is None else _wider(jnp.asarray(x), full) for x in weights]
        keys, values = (tuple(map(rounded, side)) for side in (keys, values))
        call = call_of((rounded(q), keys, values, *weights), {"scale": size**-0.5, **options})
        out, lse = mosaic_gpu.attention(call, device=self.device(), interpret=self.interpret())
        return out[..., :size].astype(q.dtype), lse

    def device(self):
        return None if on_hopper() else H100

    def interpret(self):
        return None if on_hopper() else pallas.InterpretGPUParams(detect_races=True)
