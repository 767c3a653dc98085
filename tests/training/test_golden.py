"""Fifty steps of every layout give the losses that are written down."""

import json

import numpy as np
import pytest

from fusedkv_jax import layouts
from tests.training.golden import FILE, STEPS, environment, losses

GOLDEN = json.loads(FILE.read_text())


def test_every_layout_has_a_curve_that_learns():
    assert set(GOLDEN["losses"]) == set(layouts.names())
    for layout, curve in GOLDEN["losses"].items():
        assert len(curve) == STEPS and curve[-1] < curve[0] - 0.5, layout
    assert len({curve[-1] for curve in GOLDEN["losses"].values()}) == len(GOLDEN["losses"])


@pytest.mark.parametrize(
    "layout",
    [
        layout if layout in ("mha", "fusedkv") else pytest.param(layout, marks=pytest.mark.slow)
        for layout in layouts.names()
    ],
)
def test_losses_are_those_that_are_written_down(layout):
    found, wanted = losses(layout), GOLDEN["losses"][layout]
    if environment() == GOLDEN["environment"]:
        assert found == wanted
    else:  # another compiler or processor rounds elsewhere
        np.testing.assert_allclose(found, wanted, rtol=2e-3)
