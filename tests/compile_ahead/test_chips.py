"""Names of slices, and the arithmetic of the roofline."""

import itertools

import pytest

from fusedkv_jax.compile_ahead.chips import CHIPS, Slice, TopologyError
from fusedkv_jax.compile_ahead.collectives import Collective
from fusedkv_jax.compile_ahead.roofline import Roofline, communication_seconds, group_bandwidth


@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [("v5e:1x1", 1, 1), ("v6e:8x16", 128, 128), ("v5p:4x8x12", 384, 384), ("tpu7x:2x2x1", 4, 8)],
)
def test_slices_that_exist(name, chips, devices):
    place = Slice.parse(name)
    assert (place.name, place.chips, place.devices) == (name, chips, devices)


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:2xa", "", "v5e:2x2 ", "tpu7:2x2x1"])
def test_an_unknown_chip_lists_all_slices(name):
    with pytest.raises(TopologyError, match="is unknown; known are v5e:1x1.*v5p:.*tpu7x:") as error:
        Slice.parse(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["v5e:16x32", "v5e:3x3", "v5e:2x2x2", "v5p:8x8", "v5p:2x2x3", "v5p:0x4x4",
             "v5p:16x16x28", "tpu7x:4x4x6"],
)  # fmt: skip
def test_a_shape_that_does_not_exist_lists_those_of_the_chip(name):
    with pytest.raises(TopologyError, match="does not exist; known are") as error:
        Slice.parse(name)
    assert [chip for chip in CHIPS if f"{chip}:" in str(error.value).partition("known")[2]] == [
        name.partition(":")[0]
    ]


def test_a_program_is_bound_by_its_longest_term():
    made = Roofline(2.0, 3.0, 1.0, model_flops=1.2e12, peak_flops=1e12)
    assert (made.seconds, made.bound) == (3.0, "memory")
    assert made.utilization == pytest.approx(0.4)


def test_groups_use_the_links_of_the_axes_that_they_extend_over():
    flat, cube = Slice.parse("v5e:16x16"), Slice.parse("v5p:8x8x8")
    line = [(0, y, 0) for y in range(16)]
    assert group_bandwidth(flat, line) == 100e9  # a ring: half of all links
    assert group_bandwidth(flat, line[:4]) == 50e9  # a part of it, in one direction
    everyone = list(itertools.product(range(8), repeat=3))
    assert group_bandwidth(cube, everyone) == 600e9
    assert group_bandwidth(cube, [c for c in everyone if not c[0]]) == pytest.approx(400e9)
    assert group_bandwidth(Slice.parse("tpu7x:2x2x1"), [(0, 0, 0), (0, 0, 0)]) == 300e9


def test_collectives_take_their_turns():
    place = Slice.parse("v5e:16x16")
    where = list(itertools.product(range(16), range(16)))
    rings = [Collective("all-gather", 3, 1e9, tuple(range(16)))]
    everyone = [Collective("all-reduce", 1, 4e9, tuple(range(256)))]
    assert communication_seconds(place, rings, where) == pytest.approx(3 * 1e9 / 100e9)
    assert communication_seconds(place, rings + everyone, where) == pytest.approx(0.03 + 0.02)
