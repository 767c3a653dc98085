"""Kill -9 at random moments, many of them while a checkpoint is written: nothing is lost.

FUSEDKV_KILLS=10 kills ten times instead of twice, and the runs of two more layouts besides.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from fusedkv_jax import data
from fusedkv_jax.training import Checkpoints, make_optimizer, train
from fusedkv_jax.training.checkpointing import manifest
from fusedkv_jax.training.checkpointing.directory import committed_steps
from fusedkv_jax.training.state import abstract_state

KILLS = int(os.environ.get("FUSEDKV_KILLS", "2"))
LAYOUTS = ["mha", "fusedkv", "fusedkv_lite"] if KILLS > 2 else ["fusedkv"]
STEPS, INTERVAL = max(200, 60 * KILLS), 5  # far more than are made before a kill
RUN = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from fusedkv_jax.training import ExperimentConfig, train
train(ExperimentConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2])
"""


def _start(config, workdir) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(config.to_dict()), str(workdir)],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir},
        stdout=subprocess.PIPE,
        text=True,
    )


def _kill(process: subprocess.Popen, directory: pathlib.Path, during_save: bool, rng) -> bool:
    """Kill a run at a random moment after it has begun to step; whether a save was under way."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("compiled"):
            break
    time.sleep(rng.uniform(0, 0.5))
    while during_save and process.poll() is None and not any(directory.glob("*.unfinished*")):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return any(directory.glob("*.unfinished*"))


def _final(config, workdir):
    iterator = data.make_train_iterator(config.data)
    abstract = abstract_state(config.model, make_optimizer(config.optimizer, config.train.steps))
    with Checkpoints(workdir, config.train.keep_checkpoints) as checkpoints:
        restored = checkpoints.restore(abstract, iterator, config)
    assert restored is not None
    return restored[0], next(iterator)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_runs_end_bit_identical(with_train, tmp_path, layout):
    config = with_train(steps=STEPS, checkpoint_every=INTERVAL, log_every=1)
    config = type(config)(**vars(config) | {"model": config.model.replace(layout=layout)})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole)
    rng, saving = random.Random(layout), 0
    for kill in range(KILLS):
        process = _start(config, parts)
        saving += _kill(process, parts / "checkpoints", kill % 2 == 0, rng)
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
        steps = committed_steps(parts / "checkpoints")
        for step in steps:
            manifest.verify(parts / "checkpoints" / str(step))
        logged = (parts / "metrics.jsonl").read_text().splitlines()
        # The save of the last interval may have been cut; the one before it was not.
        done = json.loads(logged[-1])["step"] if logged else 0
        assert done - max(steps, default=0) <= 2 * INTERVAL
    assert saving >= 0.4 * KILLS
    train(config, parts)
    for x, y in zip(
        jax.tree.leaves(_final(config, parts)), jax.tree.leaves(_final(config, whole)), strict=True
    ):
        np.testing.assert_array_equal(x, y)
