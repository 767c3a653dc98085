"""Step times that are fitted to a log."""

import dataclasses

import numpy as np
import pytest

from fusedkv_jax import costs
from fusedkv_jax.serving import POLICIES, PagedMemory, Request, Scheduler, StepShapes
from fusedkv_jax.serving.simulate import CalibratedDevice, simulate, summarize
from fusedkv_jax.serving.simulate.calibration import (
    TERMS,
    Accuracy,
    LoggedStep,
    errors,
    fit,
    repeat_errors,
    step_work,
    typical,
)
from pallas_kernels.xla.plan import PAGED_TILE
from tests.model import small

SHAPES = StepShapes((1, 2, 4, 8), (0, 8), (1, 2, 4, 8, 16), 8)
COSTS = costs.StepCosts.of(small.config("fusedkv"))
TRUE = dict.fromkeys(TERMS, 0.0) | {
    "step": 1e-3,
    "chunk_step": 5e-4,
    "first_decodes": 2e-4,
    "decode_flops": 2e-9,
    "chunk_flops": 4e-10,
    "upper_flops": 5e-9,
    "chunk_sweep_flops": 1e-9,
    "cache_bytes": 1e-8,
}


def device(coefficients, shapes=SHAPES):
    return CalibratedDevice("toy", coefficients, shapes, "float32", 2.0**20, 0.05, 0.04)


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


def logged_rounds(true, count, spread):
    """Logs of the same steps, which take what `true` says of their work, times noise."""
    rng, works = np.random.default_rng(3), []
    served(lambda plan: works.append(step_work(COSTS, plan, SHAPES, 4)) or 1e-3)
    return [
        [LoggedStep(work, true(work) * rng.lognormal(0, spread)) for work in works]
        for _ in range(count)
    ]


@pytest.mark.parametrize("spread", [0.05, 0.2])
def test_the_errors_of_repeats_are_the_noise_that_a_right_fit_is_left_with(spread):
    rounds = logged_rounds(lambda work: float(np.dot(work, list(TRUE.values()))), 12, spread)
    fitted = fit([step for log in rounds for i, step in enumerate(log) if i % 3])
    found = Accuracy.of(fitted, [[log[::3] for log in rounds]])
    # Half of a normal distribution is within 0.674 of its deviation.
    assert found.repeat_error == pytest.approx(0.674 * spread, rel=0.15)
    assert found.median_error == pytest.approx(found.repeat_error, rel=0.15)
    assert found.typical_error < found.repeat_error / 2


def test_a_fit_that_misses_what_takes_time_is_told_from_noise():
    """Steps that take a third more on every other page: nothing that the terms know."""
    rounds = logged_rounds(
        lambda work: 1e-3 * (1 + (work[TERMS.index("cache_bytes")] // 4096 % 2)), 4, 0.02
    )
    found = fit([step for log in rounds for step in log])
    assert np.median(repeat_errors(rounds)) < 0.03
    assert np.median(errors(found, typical(rounds))) > 0.1


def test_the_typical_step_has_the_median_of_its_seconds():
    work = (1.0,) * len(TERMS)
    rounds = [[LoggedStep(work, seconds), LoggedStep(work, 2.0)] for seconds in (1.0, 9.0, 4.0)]
    assert typical(rounds) == [LoggedStep(work, 4.0), LoggedStep(work, 2.0)]
    # 1, 9 and 4 seconds, of which the others say 6.5, 2.5 and 5.
    assert repeat_errors(rounds).tolist() == [5.5, 0, pytest.approx(6.5 / 9), 0, 0.25, 0]


def test_logs_of_other_steps_are_no_repeats():
    work = (1.0,) * len(TERMS)
    log, other = [LoggedStep(work, 1.0)], [LoggedStep((2.0, *work[1:]), 1.0)]
    with pytest.raises(ValueError, match="logs are of different steps; log the same ones"):
        repeat_errors([log, other])
    with pytest.raises(ValueError, match="different steps"):
        typical([log, log * 2])
    with pytest.raises(ValueError, match="1 logs; a step is compared with its repeats"):
        repeat_errors([log])


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
    assert work["first_decodes"] == 0


def test_rows_that_decode_for_the_first_time_are_counted():
    found = []

    def seconds(plan):
        found.append(step_work(COSTS, plan, SHAPES, 4)[TERMS.index("first_decodes")])
        return 1e-3

    records = served(seconds)
    assert sum(found) == sum(record.generated > 1 for record in records) > 100


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
