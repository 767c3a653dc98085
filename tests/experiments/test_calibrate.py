"""Steps of a real engine that `experiments.calibrate` logs."""

import time

import jax
import jax.numpy as jnp

from experiments.calibrate import Measured
from fusedkv_jax import costs
from fusedkv_jax.serving.simulate.calibration import TERMS
from tests.serving.served import engine

PAUSE = 0.05


def test_a_step_that_samples_nothing_is_logged_with_its_own_seconds():
    """Of an engine whose device goes on for so long after each step has been sent off."""

    def slow(pool):
        def wait(token):
            time.sleep(PAUSE)
            return token

        nothing = jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), jnp.float32(0))
        return jax.tree.map(lambda x: x + nothing, pool)

    served = engine(max_num_batched_tokens=8)
    slow, step = jax.jit(slow), served.step

    def slow_step():
        deltas = step()
        served.runner.pool = slow(served.runner.pool)
        return deltas

    served.step = slow_step
    log = Measured(served, costs.StepCosts.of(served.config)).log_steps(12, seed=0)
    upper = [step.work[TERMS.index("upper_flops")] for step in log]
    assert len(log) >= 12 and min(upper) == 0 < max(upper)
    assert min(step.seconds for step in log) >= PAUSE
