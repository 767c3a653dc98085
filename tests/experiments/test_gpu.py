"""`experiments.gpu`: the plan, its steps one by one, and a run on a processor."""

import json
import pathlib
import subprocess
import sys
import time
import types

import jax
import pytest

from experiments import gpu
from experiments.benchmarks import accelerator, steps
from experiments.benchmarks.steps import Step
from tests.experiments import commands

PYTHON = sys.executable


def run(step: Step, folder: pathlib.Path, seconds: float | None = None):
    where = dict(environment={}, root=folder, seconds=seconds)
    return steps.run(step, folder, folder, **where)


def test_the_most_valuable_part_comes_first_and_measurements_exist():
    plan = gpu.make_plan(
        list(gpu.PARTS), quick=False, rounds=3, study=["--sizes=3.5m"], hopper=True
    )
    assert list(dict.fromkeys(step.part for step in plan)) == list(gpu.PARTS)
    assert len({step.name for step in plan}) == len(plan)
    known = accelerator.measurements(quick=False, rounds=3, torch_compile=False)
    for step in plan:
        if step.part in ("kernels", "models"):
            assert step.command[-1] == f"--only={step.name}" and step.name in known
    assert {"latency_332m_2048", "latency_1_5b_8192", "decode_32x4096_128"} <= set(known)
    slices = [step.command[-2:] for step in plan if step.name[:-1] == "numerics_"]
    assert slices == [(f"--every={len(slices)}", f"--first={i}") for i in range(len(slices))]
    limited = [step.name for step in plan if step.limit]  # what might hang comes last of a part
    assert limited[0] == "numerics_hopper" and {"hopper_prefill_4096_128"} <= set(limited)
    for part in ("numerics", "kernels"):
        limits = [step.limit is not None for step in plan if step.part == part]
        assert any(limits) and limits == sorted(limits)
    without = gpu.make_plan(["models", "study"], quick=False, rounds=3, study=None, hopper=False)
    assert {step.part for step in without} == {"models"}
    without = gpu.make_plan(list(gpu.PARTS), quick=False, rounds=3, study=None, hopper=False)
    assert not [step.name for step in without if "hopper" in step.name]


def test_a_step_leaves_its_last_line_or_says_how_it_failed(tmp_path):
    good = Step("kernels", "good", (PYTHON, "-c", 'print("table"); print(\'{"targets": 1}\')'))
    bad = Step("kernels", "bad", (PYTHON, "-c", 'raise SystemExit("out of memory")'))
    silent = Step("kernels", "silent", (PYTHON, "-c", "print('no document')"))
    assert steps.read(good, tmp_path) is None
    found = run(good, tmp_path)
    assert found == steps.read(good, tmp_path)
    assert (found["state"], found["result"]) == ("done", {"targets": 1})
    assert run(bad, tmp_path)["last_lines"] == ["out of memory"]
    assert run(silent, tmp_path)["state"] == "failed"
    stuck = run(Step("kernels", "stuck", (PYTHON, "-c", "while True: pass"), 2), tmp_path)
    assert stuck["state"] == "failed" and "not done after 2 s" in stuck["last_lines"][-1]
    never = Step("study", "never", ())
    table = steps.markdown("A device", [good, bad, never], tmp_path)
    assert "| kernels | bad | failed |" in table and "out of memory" in table
    assert "| study | never | to do |" in table


def test_a_step_that_is_cut_off_leaves_no_result_and_no_process(tmp_path):
    own = "import os, time; os.fork(); open(str(os.getpid()), 'w'); time.sleep(600)"
    slow = Step("kernels", "slow", (PYTHON, "-c", own))
    assert run(slow, tmp_path, seconds=3) is None and steps.read(slow, tmp_path) is None
    started = [int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal()]
    assert len(started) == 2
    deadline = time.monotonic() + 60
    while any(_runs(number) for number in started):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _runs(process: int) -> bool:
    try:
        fields = pathlib.Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return fields.rpartition(")")[2].split()[0] != "Z"


def test_tests_are_counted_and_failures_named(tmp_path):
    case = "def test_right(): pass\n\ndef test_wrong(): assert 0\n"
    (tmp_path / "test_it.py").write_text(case)
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", "{junit}", "test_it.py")
    step = Step("numerics", "numerics", (PYTHON, *words))
    found = run(step, tmp_path)
    expected = {"passed": 1, "skipped": 0, "failed": ["test_wrong"]}
    assert (found["state"], found["result"]) == ("failed", expected)
    assert "1 passed, 0 skipped, test_wrong failed" in steps.markdown("x", [step], tmp_path)


def test_where_all_tests_were_skipped_nothing_was_tested(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text("<testsuite><testcase name='test'><skipped/></testcase></testsuite>")
    assert steps._junit(path) is None


def main(monkeypatch, **values) -> int:
    given = dict(parts=["kernels"], minutes=None, rounds=1, data=None, sizes=[], quick=True)
    monkeypatch.setattr(gpu, "FLAGS", types.SimpleNamespace(**given | values))
    return gpu.main()


def test_what_is_finished_is_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_device", lambda quick: ("NVIDIA H100 80GB HBM3", True))
    broken = tmp_path / "broken"
    words = f"import os; print({{}} if not os.path.exists({str(broken)!r}) else '')"
    plan = [Step("kernels", name, (PYTHON, "-c", words)) for name in ("one", "two")]
    monkeypatch.setattr(gpu, "make_plan", lambda *_, **__: plan)
    folder = tmp_path / "nvidia_h100_80gb_hbm3"

    assert main(monkeypatch, output=tmp_path, minutes=0) == 75
    assert "left: one, two" in capsys.readouterr().err
    broken.touch()
    assert main(monkeypatch, output=tmp_path) == 1
    broken.unlink()
    assert main(monkeypatch, output=tmp_path) == 0  # what failed runs again
    assert capsys.readouterr().err.count("...") == 4
    assert main(monkeypatch, output=tmp_path) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.strip() == (folder / "results.md").read_text().strip()
    assert out.startswith("# NVIDIA H100 80GB HBM3") and out.count("| done |") == 2


@pytest.mark.slow
def test_a_quick_run_on_a_processor(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    line = ["--quick", "--rounds=1", "--parts=models", f"--output={tmp_path}"]
    ((code, out, err),) = commands.run("gpu", line)
    assert code == 0 and "models: latency_toy_24 ..." in err, err
    assert "TTFT of fusedkv, of mha's" in out
    found = json.loads((tmp_path / "cpu" / "latency_toy_24.json").read_text())
    rows = found["result"]["measurements"]["latency_toy_24"]["rows"]
    assert [row["layout"] for row in rows] == ["mha", "fusedkv"]


def test_mistakes(monkeypatch):
    with pytest.raises(ValueError, match="--parts=kernel is unknown"):
        gpu._parts(["kernel"])
    for code, printed in ((1, ""), (0, "a warning\ncpu\ncpu\n\n")):
        done = subprocess.CompletedProcess([], code, stdout=printed, stderr="")
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        with pytest.raises(ValueError, match="no NVIDIA GPU was found"):
            gpu._device(quick=False)
    assert gpu._device(quick=True) == ("cpu", False)
