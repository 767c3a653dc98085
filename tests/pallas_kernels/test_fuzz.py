"""A weekly sample of random calls, with XLA's optimizations; see `fuzz`.

`FUSEDKV_FUZZ_CASES=1000 FUSEDKV_FUZZ_SEED=mine make test ARGS=tests/pallas_kernels/test_fuzz.py`
tries more, or others. Triton's share runs in its interpreter's process: `gpu/interpreted.py`.
"""

import pytest

from tests.pallas_kernels import fuzz
from tests.pallas_kernels.fuzz_ragged import ragged
from tests.pallas_kernels.implementation import Implementation
from tests.pallas_kernels.test_reference import Reference
from tests.pallas_kernels.test_xla import Xla
from tests.pallas_kernels.tpu.test_tpu_attention import Tpu


class Folded(Implementation):
    implementation = "folded"


ALL = fuzz.Limits()
FEW = fuzz.Limits(rows=64, numbers=2**15, sizes=(16, 64, 128), keys=128)
STEPS = fuzz.Limits(rows=64, sizes=(16, 64, 128), keys=512)
# name: (form, implementation, limits, parts of 200)
SHARES = {
    "xla": (fuzz.attention, Xla, ALL, 68),
    "folded": (fuzz.attention, Folded, ALL, 20),
    "reference": (fuzz.attention, Reference, ALL, 20),
    "xla quantized": (fuzz.quantized, Xla, ALL, 37),
    "xla paged": (fuzz.paged, Xla, ALL, 35),
    "xla ragged": (ragged, Xla, ALL, 12),
    "tpu": (fuzz.attention, Tpu, FEW, 4),
    "tpu quantized": (fuzz.quantized, Tpu, FEW, 2),
    "tpu paged": (fuzz.paged, Tpu, FEW, 2),
    "tpu ragged": (ragged, Tpu, STEPS, 2),
}


@pytest.mark.usefixtures("fresh_compilation")
@pytest.mark.parametrize("share", SHARES)
def test_random_calls_match_the_definition(share):
    form, how, limits, parts = SHARES[share]
    fuzz.run(form, how(), limits, fuzz.share(parts))
