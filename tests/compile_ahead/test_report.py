"""Reports of programs, from what a compiler would say of them."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.compile_for_tpu import _settings, paper_run
from fusedkv_jax.compile_ahead import report
from fusedkv_jax.compile_ahead.chips import Slice
from fusedkv_jax.sharding import MeshConfig
from tests.compile_ahead.test_collectives import entry

PLACE = Slice.parse("v5e:2x2")
EVERY_DEVICE = entry(
    "%x = f32[8,8]{1,0} parameter(0)",
    "ROOT %y = f32[8,8]{1,0} all-reduce(%x), channel_id=1, replica_groups={}, to_apply=%add",
)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_work_is_divided_over_the_devices_of_the_mesh(devices):
    """Which need not be all of the slice."""
    places = [SimpleNamespace(coords=(i % 2, i // 2, 0)) for i in range(devices)]
    mesh = SimpleNamespace(size=devices, devices=np.array(places))
    program = SimpleNamespace(
        name="train", mesh=mesh, visible=1.0, cache_reads=0.0, model_flops=4e12, parts={}, tokens=1
    )
    memory = SimpleNamespace(
        argument_size_in_bytes=0, peak_memory_in_bytes=0, generated_code_size_in_bytes=0
    )
    compiled = SimpleNamespace(memory_analysis=lambda: memory, as_text=lambda: EVERY_DEVICE)
    found = report.analyze(program, PLACE, compiled, 0.0)  # type: ignore[arg-type]
    assert found.estimate.model_flops == 4e12 / devices
    # An all-reduce over all devices sends 2 (n - 1) / n of its bytes, and nothing where n is 1.
    sent = found.collectives.get("all-reduce", (0, 0.0))[1]
    assert sent == 2 * (devices - 1) / devices * 8 * 8 * 4


def test_the_settings_name_the_mesh_of_the_devices_that_are_used():
    config = paper_run("332m", "mha")
    one = dataclasses.replace(config, mesh=MeshConfig(devices=1))
    assert "data=1 x" in _settings(one, PLACE)
    whole = dataclasses.replace(config, mesh=MeshConfig())
    assert "data=4 x" in _settings(whole, PLACE)
