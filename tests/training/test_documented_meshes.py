"""The documented commands for several devices name a mesh that fits, and a batch that divides."""

import pathlib
import re

import jax
import pytest

from experiments.common.overrides import apply_overrides
from experiments.configs import demo
from fusedkv_jax.sharding import AXES, check_batch

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("file", "before", "devices"),
    [
        ("docs/guides/commands.md", "run it again to resume", 8),
        ("docs/guides/clusters.md", "# on node0", 2),
        ("docs/guides/clusters.md", "# on node1", 2),
        ("docs/guides/clusters.md", "#SBATCH", 4 * 8),
        ("docs/guides/clusters.md", "kind: JobSet", 4 * 8),
        ("docs/guides/clusters.md", "--accelerator-type=v5p-128", 64),
        ("docs/guides/clusters.md", "### Open MPI", 4),
    ],
)
def test_batch_divides_over_the_devices(file, before, devices):
    text = (ROOT / file).read_text()
    start = re.search(before, text)
    assert start is not None
    command = re.split(r"experiments\.train", text[start.end() :])[1]
    command = re.split(r"`|\n\n|\nenv", command.replace("\\\n", " "))[0]
    overrides = re.findall(r"--config\.([\w.]+=[-\w]+)", command)
    config = apply_overrides(demo.get_config(), overrides)
    mesh = jax.sharding.AbstractMesh(config.mesh.sizes(devices), AXES)
    check_batch(mesh, config.data.batch_size, config.data.seq_len, config.train.grad_accumulation)
    assert overrides and config.data.batch_size >= devices / config.mesh.tensor
