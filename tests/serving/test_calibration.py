"""Step times that are fitted to a log."""

import dataclasses

import numpy as np
import pytest

from fusedkv_jax import costs
from fusedkv_jax.serving import POLICIES, PagedMemory, Request, Scheduler, StepShapes
from fusedkv_jax.serving.simulate import CalibratedDevice, simulate, summarize
from fusedkv_jax.serving.simulate.calibration import TERMS, LoggedStep, errors, fit, step_work
from pallas_kernels.xla.plan import PAGED_TILE
from tests.model import small

SHAPES = StepShapes((1, 2, 4, 8), (0, 8), (1, 2, 4, 8, 16), 8)
COSTS = costs.StepCosts.of(small.config("fusedkv"))
TRUE = dict.fromkeys(TERMS, 0.0) | {
    "step": 1e-3,
    "chunk_step": 5e-4,
    "decode_flops": 2e-9,
    "chunk_flops": 4e-10,
    "upper_flops": 5e-9,
    "chunk_sweep_flops": 1e-9,
    "cache_bytes": 1e-8,
}


def device(coefficients, shapes=SHAPES):
    return CalibratedDevice("toy", coefficients, shapes, "float32", 2.0**20, 0.05)


def served(step_seconds, watch=None, max_num_seqs=8):
    rng = np.random.default_rng(0)
    requests = [
        Request(
            str(i), rng.integers(0, 99, int(rng.integers(1, 60))), int(rng.integers(1, 30)), i / 99
        )
        for i in range(120)
    ]
    scheduler = Scheduler(
        PagedMemory(400, 4),
        POLICIES["fcfs"](),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=64,
    )
    return simulate(requests, scheduler, step_seconds, watch)


def test_a_fit_finds_what_steps_take_and_forgets_the_odd_ones():
    rng, log = np.random.default_rng(1), []

    def seconds(plan):
        work = step_work(COSTS, plan, SHAPES, 4)
        true = float(np.dot(work, list(TRUE.values())))
        odd = 20.0 if rng.random() < 0.05 else 1.0
        log.append(LoggedStep(work, true * rng.normal(1, 0.03) * odd))
        return true

    records = served(seconds)
    found = fit(log[::2])
    assert np.median(errors(found, log[1::2])) < 0.04
    assert all(value >= 0 for value in found.values())
    again = served(lambda plan: device(found).step_seconds(COSTS, plan, 4))
    ours, true = summarize(again), summarize(records)
    assert np.allclose(ours.ttft, true.ttft, rtol=0.15) and np.allclose(
        ours.tpot, true.tpot, rtol=0.1
    )


def test_predicted_seconds_add_up_to_those_of_a_log_whose_times_are_skewed():
    rng, log = np.random.default_rng(2), []

    def seconds(plan):
        work = step_work(COSTS, plan, SHAPES, 4)
        true = float(np.dot(work, list(TRUE.values())))
        log.append(LoggedStep(work, true * (1 + rng.exponential(0.2))))
        return true

    served(seconds)
    coefficients = fit(log)
    predicted = sum(np.dot(step.work, list(coefficients.values())) for step in log)
    assert predicted == pytest.approx(sum(step.seconds for step in log), rel=0.01)
    assert np.median(errors(coefficients, log)) < 0.15


def test_padding_counts_as_the_engine_pads():
    requests = [Request("a", np.arange(9), 2), Request("b", np.arange(20), 2)]
    scheduler = Scheduler(
        PagedMemory(40, 4), POLICIES["fcfs"](), max_num_batched_tokens=24, max_num_seqs=8
    )
    for request in requests:
        scheduler.add(request, 0.0)
    work = dict(zip(TERMS, step_work(COSTS, scheduler.schedule(0.0), SHAPES, 4), strict=True))
    # 9 and 15 tokens: four rows of 8, and 8 rows beside them of which one is sampled.
    assert work["chunk_step"] == 1
    assert work["decode_flops"] == 8 * COSTS.token_flops
    assert work["chunk_flops"] == 4 * 8 * COSTS.token_flops
    assert work["upper_flops"] == 8 * COSTS.row_flops
    lower = sum(layers.lower_flops for layers in COSTS.attention.values())
    assert work["chunk_sweep_flops"] == 4 * 8 * PAGED_TILE * lower  # 15 tokens take a whole tile


def test_a_calibration_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "calibration.json"
    device(TRUE).write(path)
    assert CalibratedDevice.read(path) == device(TRUE)
    path.write_text('{"name": "toy"}')
    with pytest.raises(ValueError, match="is no calibration of experiments.calibrate"):
        CalibratedDevice.read(path)


def test_steps_that_were_not_calibrated_are_refused():
    small_one = device(TRUE, dataclasses.replace(SHAPES, decode_rows=(1, 2), mixed_rows=(0, 2)))
    with pytest.raises(ValueError, match="larger than any that was calibrated"):
        served(lambda plan: small_one.step_seconds(COSTS, plan, 4))
