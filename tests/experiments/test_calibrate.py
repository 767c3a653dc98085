"""Steps of a real engine that `experiments.calibrate` logs."""

import time

import jax
import jax.numpy as jnp

from experiments.calibrate import Measured
from fusedkv_jax import costs
from fusedkv_jax.serving import page_runner
from fusedkv_jax.serving.simulate.calibration import TERMS
from tests.serving.served import engine

PAUSE = 0.05


def test_a_step_that_samples_nothing_is_logged_with_its_own_seconds(monkeypatch):
    """Of an engine whose device takes so long for each step."""

    def wait(token):
        time.sleep(PAUSE)
        return token

    @jax.jit
    def slow(outputs):
        nothing = jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.int32), jnp.int32(0))
        return jax.tree.map(lambda x: x + nothing.astype(x.dtype), outputs)

    run_step = page_runner.run_step
    monkeypatch.setattr(page_runner, "run_step", lambda *inputs: slow(run_step(*inputs)))
    served = engine(max_num_batched_tokens=8, async_scheduling=False)
    log = Measured(served, costs.StepCosts.of(served.config)).log_steps(12, seed=0)
    upper = [step.work[TERMS.index("upper_flops")] for step in log]
    assert len(log) >= 12 and min(upper) == 0 < max(upper)
    assert min(step.seconds for step in log) >= 0.9 * PAUSE


def test_rounds_are_of_the_same_steps_and_share_no_prefix():
    made = engine(max_num_batched_tokens=16, num_pages=400)
    measured = Measured(made, costs.StepCosts.of(made.config))
    first, second = (measured.log_steps(40, seed=seed) for seed in (0, 1))
    assert len(first) >= 40
    assert [step.work for step in first] == [step.work for step in second]
    assert made.stats().prefix_hits == 0
