"""The suite `kernels`: its arithmetic, what it says of refusals, and the files it writes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from experiments.benchmarks import kernels, kernels_static, kernels_timed, report
from experiments.benchmarks.kernels_timed import AttentionShape
from pallas_kernels.gpu import static as static_gpu
from pallas_kernels.tpu import static

SHAPE = AttentionShape(batch=1, queries=8, keys=8, heads=4, kv_heads=2, size=8)


def test_flops_count_the_visible_pairs():
    pairs = sum(s <= t for t in range(8) for s in range(8))
    assert SHAPE.causal_flops == 2 * 2 * 4 * 8 * pairs
    one = AttentionShape(batch=3, queries=1, keys=8, heads=4, kv_heads=2, size=8)
    assert one.causal_flops == 3 * 2 * 2 * 4 * 8 * 8


def test_repeated_calls_depend_on_each_other():
    found = kernels_timed.repeated(lambda q, w: w.sum() * jnp.ones_like(q), 3)(
        jnp.zeros(4), jnp.ones((1, 1, 2))
    )
    np.testing.assert_allclose(found, 3 * 2e-6, rtol=1e-4)


def test_all_gradients_are_part_of_a_training_step():
    q, keys, values, *weights = SHAPE.draw(2, jnp.float32)
    attend = lambda *x: pallas_kernels.attention(*x, implementation="reference")  # noqa: E731
    step = kernels_timed.gradients(attend)(q, keys, values, *weights)
    each = jax.grad(lambda *x: attend(*x).sum(), range(5))(q, keys, values, *weights)
    others = sum(x.mean() for x in jax.tree.leaves(each[1:]))
    np.testing.assert_allclose(step, each[0] + others, rtol=1e-4, atol=1e-5)


def test_decoding_is_held_against_the_copy_and_refusals_are_told(monkeypatch):
    limits = {"copy bytes/s": 1e9, "product FLOP/s": 1e12}
    monkeypatch.setattr(kernels_timed, "ceilings", lambda quick, rounds: limits)
    names = ("auto", "cudnn")
    one = AttentionShape(batch=2, queries=1, keys=32, heads=4, kv_heads=2, size=8)
    found = kernels_timed.measure_decode(one, names, quick=True, rounds=1)
    rows = {row["contestant"]: row for row in found.rows}
    size = 2 * 2 * 32 * 2 * 8 * 2  # keys and values, bfloat16
    for name, count in (("own bf16, auto", 1), ("rebuilt bf16, auto", 2)):
        assert rows[name]["GB/s"] * rows[name]["us"] * 1e3 == pytest.approx(count * size)
        assert rows[name]["of a copy's"] == pytest.approx(rows[name]["GB/s"])
    assert "cuDNN is not used" in found.setting["no own bf16, cudnn"]
    targets = {target.name: target.value for target in found.targets}
    ratio = rows["rebuilt int8, auto"]["us"] / rows["own bf16, auto"]["us"]
    assert targets["rebuilt int8, of the time of own bf16"] == pytest.approx(ratio)


def test_auto_is_held_against_the_best_and_a_kernel_against_itself_on_plain_streams():
    times = {"plain, auto": 2.0, "plain, triton": 1.0, "rebuilt, auto": 3.0, "rebuilt, triton": 4.0}
    found = {target.name: target for target in kernels_timed._targets(times, False)}
    assert found["plain: auto, of the best's time"].value == 2
    assert not found["plain: auto, of the best's time"].met
    assert found["rebuilt: auto, of the best's time"].met
    assert found["triton: rebuilt, of the plain one's speed"].value == 0.25


def test_schedules_are_held_against_splash_attention(monkeypatch):
    bundles = {"splash": 1000, "plain": 950, "tile": 1300, "folded": 1040}
    cost = lambda chip, kernel, *_: {"bundles": bundles[kernel], "MXU": 500, "VPU": 9}  # noqa: E731
    monkeypatch.setattr(static, "step_cost", cost)
    monkeypatch.setattr("pallas_kernels.tpu.topology.devices", lambda chip: ())
    found = kernels_static.tpu_schedules(quick=False)
    assert len(found.rows) == 16
    assert {t.name: (t.value, t.met) for t in found.targets} == {
        "v5e tile: bundles, of splash attention's": (1.3, False),
        "v6e folded: bundles, of splash attention's": (1.04, True),
    }
    assert found.rows[0]["matrix slots a bundle"] == 0.5


def test_the_report_says_in_a_line_why_a_kernel_is_left_out(monkeypatch):
    """The plugin starts once in a process, and not beside some others."""

    def device():
        raise NotImplementedError("the plugin did not start\nat all")

    rows = [{"kernel": "forward", "spill": 0, "shared": 9, "serialized": 0}]
    monkeypatch.setattr(static_gpu, "report", lambda chip, shapes: list(rows))
    monkeypatch.setattr("pallas_kernels.mosaic_gpu.static.device", device)
    found = kernels_static.gpu_resources("h100", quick=False)
    assert found.rows == rows
    assert ", mosaic_gpu left out: the plugin did not start\n" in found.text()
    assert "mosaic_gpu" not in kernels_static.gpu_resources("b200", quick=False).text()


def test_a_measurement_comes_back_from_its_document():
    target = report.Target("share", 0.5, ">=", 0.8)
    found = report.Measurement("A title", {"batch": 1}, [{"kernel": "tile"}], [target])
    again = report.Measurement.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.text() == found.text() and "MISSED" in again.text()


def test_on_a_processor_the_report_is_static_and_written_with_the_device(tmp_path):
    names = kernels.measurements(quick=True, rounds=1, torch_compile=False)
    assert list(names) == ["tpu_schedules", *(f"gpu_resources_{x}" for x in static_gpu.CHIPS)]
    document = {"suite": "kernels"} | report.environment()
    found = report.Measurement("A title", rows=[{"kernel": "tile", "spill": 0}])
    report.write(str(tmp_path / "out"), document, [found.text()])
    assert json.loads((tmp_path / "out.json").read_text()) == document
    text = (tmp_path / "out.md").read_text()
    assert "## A title" in text and "Device: cpu" in text and "tile" in text
