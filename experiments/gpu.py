"""All that an NVIDIA GPU can tell, most valuable part first: python -m experiments.gpu.

The parts: numerics (every kernel against the definition), kernels (timed beside their peers),
models (first and later tokens of fusedkv against mha at 332m and 1.5B) and study (the scaling
study's largest size, on the text of --data). A part has steps, each with a result file; what is
there is not run again, so that the same command goes on where --minutes or an interruption cut it
off. Results and their table, results.md, are left in OUTPUT/DEVICE. The exit code is 75 if steps
are left, and 1 if some failed; those run again.
"""

import os
import pathlib
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from absl import flags

from experiments.common import cli

if TYPE_CHECKING:
    from experiments.benchmarks.steps import Step

FLAGS = flags.FLAGS

PARTS = ("numerics", "kernels", "models", "study")
_ROOT = pathlib.Path(__file__).parents[1]
_TESTS = "tests/pallas_kernels/gpu"
_SLICES = 6  # of the tests, so that a short loan finishes some
_LIMIT = 900  # seconds of what has never run on a GPU
_LEFT = 75  # as in training: run the same command again


def define_flags() -> None:
    """Define the flags of this program."""
    flags.DEFINE_list("parts", list(PARTS), f"What to run, of {', '.join(PARTS)}.")
    flags.DEFINE_float(
        "minutes", None, "Stop after so many; by default when all is done.", lower_bound=0
    )
    flags.DEFINE_integer("rounds", 5, "Turns of each contestant.", lower_bound=1)
    flags.DEFINE_string("data", None, "Folder of the study's text; see experiments.reproduce.")
    flags.DEFINE_list("sizes", ["3.5m"], "Sizes of the study.")
    flags.DEFINE_string(
        "output",
        None,
        "Folder of the results; by default experiments/results/gpu, runs/gpu_quick with --quick.",
    )
    flags.DEFINE_bool(
        "quick", False, "Try it on a processor: Triton's interpreter and toy sizes, no GPU needed."
    )


def main() -> int:
    from experiments.benchmarks import steps

    quick, rounds = FLAGS.quick, FLAGS.rounds
    parts = _parts(FLAGS.parts)
    output = FLAGS.output or ("runs/gpu_quick" if quick else "experiments/results/gpu")
    device, hopper = _device(quick)
    name = re.sub(r"\W+", "_", device.lower())
    folder = cli.check_output(pathlib.Path(output) / name, folder=True).resolve()
    logs = cli.check_output(folder / "logs", folder=True)
    study = _study(folder / "study")
    plan = make_plan(parts, quick=quick, rounds=rounds, study=study, hopper=hopper)
    end = None if FLAGS.minutes is None else time.monotonic() + 60 * FLAGS.minutes
    failed, left = [], []
    for step in plan:
        found = steps.read(step, folder)
        if found and found["state"] == "done":
            continue
        seconds = None if end is None else end - time.monotonic()
        if seconds is not None and seconds <= 0:
            left.append(step.name)
            continue
        print(f"{step.part}: {step.name} ...", file=sys.stderr, flush=True)
        found = steps.run(
            step, folder, logs, environment=_environment(quick), root=_ROOT, seconds=seconds
        )
        if not found:
            left.append(step.name)
        elif found["state"] == "failed":
            failed.append(step.name)
            print(f"failed: {step.name}; see {logs / step.name}.log", file=sys.stderr)
        _write(folder, device, plan)
    _write(folder, device, plan)
    print((folder / "results.md").read_text(encoding="utf-8"))
    if left:
        print(f"left: {', '.join(left)}; the same command goes on", file=sys.stderr)
    return 1 if failed else _LEFT if left else 0


def make_plan(
    parts: list[str], *, quick: bool, rounds: int, study: list[str] | None, hopper: bool
) -> "list[Step]":
    """The steps of the parts, in order.

    Args:
      parts: of `PARTS`.
      quick: what a processor does in seconds.
      rounds: turns of each contestant.
      study: arguments of `experiments.reproduce`; None leaves the study out.
      hopper: the GPU can run Hopper's own kernel.
    """
    from experiments.benchmarks import accelerator, kernels
    from experiments.benchmarks.steps import Step

    python = sys.executable
    timed = list(kernels.timed("gpu", quick=quick, rounds=rounds, torch_compile=False))
    # What serving is made of comes first, and last what no GPU has run and might hang.
    timed.sort(key=lambda name: (name.startswith("hopper"), not name.startswith("decode")))
    timed = [name for name in timed if hopper or not name.startswith("hopper")]
    models = list(accelerator.models(quick=quick, rounds=rounds))
    if quick:
        timed = [name for name in timed if name.startswith("decode")]
    plan = []
    tests = ("interpreted", "test_mosaic_gpu")
    tests = (*(f"{_TESTS}/{x}.py" for x in tests), "-kdefinition and (one_token or long_ragged)")
    pytest = (python, "-m", "pytest", "-q", "--tb=short", "--junitxml", "{junit}")
    for i in range(1 if quick else _SLICES):
        chosen = (
            tests if quick else (f"{_TESTS}/test_on_gpu.py", f"--every={_SLICES}", f"--first={i}")
        )
        plan.append(Step("numerics", f"numerics_{i + 1}", (*pytest, *chosen)))
    if hopper:
        command = (*pytest, f"{_TESTS}/test_mosaic_gpu_on_gpu.py")
        plan.append(Step("numerics", "numerics_hopper", command, _LIMIT))
    suite = (python, "-m", "experiments.benchmark", "--suite=accelerator", f"--rounds={rounds}")
    suite += ("--quick",) if quick else ()
    for part, names in (("kernels", timed), ("models", models)):
        for name in names:
            limit = _LIMIT if name.startswith("hopper") else None
            plan.append(Step(part, name, (*suite, f"--only={name}"), limit))
    if study is not None:
        command = (python, "-m", "experiments.reproduce", "--study=scaling", *study)
        plan.append(Step("study", "study", command))
    return [step for step in plan if step.part in parts]


def _parts(names: list[str]) -> list[str]:
    for name in names:
        if name not in PARTS:
            raise ValueError(f"--parts={name} is unknown; choose {', '.join(PARTS)}")
    if "numerics" in names and not (_ROOT / _TESTS).is_dir():
        raise ValueError("--parts=numerics needs the tests, which are in the repository alone")
    if not names:
        raise ValueError(f"--parts names none; choose {', '.join(PARTS)}")
    return names


def _study(output: pathlib.Path) -> list[str] | None:
    """Arguments for the study; None, which leaves it out, without text."""
    sizes, data = ",".join(FLAGS.sizes), FLAGS.data
    if data is None:
        if "study" in FLAGS.parts:
            print("the study is left out: name its text with --data=FOLDER", file=sys.stderr)
        return None
    where = pathlib.Path(data).expanduser().resolve()
    return [f"--sizes={sizes}", f"--data={where}", f"--output={output}"]


def _environment(quick: bool) -> dict[str, str]:
    if quick:
        return {**os.environ, "JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"}
    # Some steps have two libraries on the GPU; neither may take all memory beforehand.
    own = {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return {**os.environ, **own}


def _device(quick: bool) -> tuple[str, bool]:
    """JAX's name of the GPU and whether it is a Hopper; a process of its own gives the GPU back."""
    code = (
        "import jax; d = jax.devices()[0]; "
        "print(d.platform, d.device_kind, getattr(d, 'compute_capability', ''), sep=chr(10))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment(quick), capture_output=True, text=True
    )
    platform, *found = done.stdout.splitlines()[-3:] or [""]
    if done.returncode or (platform != "gpu" and not quick):
        raise ValueError(
            "no NVIDIA GPU was found; install the extra `gpu`, or try the program with --quick"
        )
    return found[0], found[1] == "9.0"


def _write(folder: pathlib.Path, device: str, plan: "list[Step]") -> None:
    from experiments.benchmarks import steps

    path = folder / "results.md"
    path.write_text(steps.markdown(device, plan, folder), encoding="utf-8")


if __name__ == "__main__":
    define_flags()
    cli.run(main, keep_programs=False)
