"""What the compiler's schedule says of the kernels, beside stock splash attention."""

import importlib.util

import pytest

from pallas_kernels.tpu import static


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    # Found 1.03 and 1.06; another compiler may schedule otherwise.
    ("chip", "kernel", "most"),
    [("v5e", "tile", 1.2), ("v6e", "folded", 1.2)],
)
def test_two_sources_cost_little_more_than_one(chip, kernel, most):
    found = static.compare(chip, kernel)
    assert 0.5 < found["ratio"] < most, found
    assert found["bundles"] > 500  # the loop itself, not only what is around it
