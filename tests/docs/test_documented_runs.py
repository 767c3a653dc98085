"""What the documentation tells one machine to run is run, at small size."""

import fnmatch
import shlex

import jax
import pytest

from tests.docs.documented import PAGES, ROOT, commands, placed, program_line
from tests.experiments.commands import run_several

# What makes a documented command a matter of seconds; the rest of it stays as it is written.
TINY = [
    "--config.model.num_layers=4",
    "--config.model.d_model=16",
    "--config.model.num_heads=4",
    "--config.model.d_ff=32",
    "--config.data.seq_len=32",
    "--config.data.max_documents=40",
    "--config.train.steps=2",
    "--config.train.eval_batches=1",
]
SMALL = {
    "train": TINY,
    "generate": ["--max_tokens=2"],
    "evaluate": ["--max_batches=1"],
    "prune": ["--texts=2", "--max_batches=1", "--length=32", "--rounds=1"],
    "prepare_data": ["--num_shards=1"],
    "simulate": ["--num_requests=8"],
}
NOT_RUN = {
    "benchmark": "tests of its own run each suite at toy size",
    "calibrate": "a test of its own runs it at toy size",
    "compile_for_tpu": "tests of its own compile with libtpu",
    "gpu": "a test of its own runs it at toy size",
    "reproduce": "tests of its own run it and its study at toy size",
    "serve": "a test of its own starts it and asks it",
    "uptrain": "a test of its own runs it at toy size",
    "*--coordinator=*": "several machines; tests/processes runs them",
    "*shared_run*": "several machines; their meshes are checked above",
    "*--suite=longcontext*": "a test of its own runs it at toy size",
    "*--config=recall*": "the same configuration's test trains it",
    "*--model=*": "needs a model of others; tests/experiments/test_models.py has each flag",
    "*--init_from=*": "the same",
    "*--device=runs/calibrate*": "needs the calibration; the same test hands it on",
    "*azure_conv_2023*": "needs the trace; another command of the program is run",
}


def why_not_run(name: str, arguments: list[str]) -> str | None:
    """The entry of NOT_RUN for a command, "*" for a program's mere name; None if it is run."""
    if not arguments and name not in ("costs", "describe"):
        return "*"
    text = shlex.join(arguments)
    return next((key for key in NOT_RUN if key == name or fnmatch.fnmatch(text, key)), None)


def test_reasons_for_not_running_are_about_commands_that_are_there(tmp_path):
    lines = [(name, placed(rest, tmp_path)) for name, rest in _lines_of_pages()]
    used = {why_not_run(name, rest) for name, rest in lines}
    assert used - {None, "*"} == set(NOT_RUN)


def _lines_of_pages() -> list[tuple[str, list[str]]]:
    return [line for path in PAGES for c in commands(path) if (line := program_line(c))]


@pytest.mark.slow
def test_what_one_machine_can_run_is_run(tmp_path, monkeypatch):
    """The first documented line of each program, and the first on a mesh, after one training run.

    Their other lines are read above, and costs and describe are run there.
    """
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("def f(x):\n    return x + 1 if x > 0 else x - 1\n")
    trace = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    trace += [f"2023-11-16 18:00:{i:02d}.0000000,{20 + i},{3 + i}" for i in range(8)]
    (tmp_path / "trace.csv").write_text("\n".join(trace) + "\n")
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"The cache of layer {i} is not kept.\n" * 9)
    found: dict[str, tuple[str, list[str]]] = {}
    for name, arguments in _lines_of_pages():
        arguments = placed(arguments, tmp_path)
        if why_not_run(name, arguments) is None and name not in ("costs", "describe"):
            key = "mesh" if any(".mesh." in argument for argument in arguments) else name
            found.setdefault(key, (name, _own(name, arguments, len(found))))
    assert {"train", "mesh", "inspect", "evaluate", "generate", "prune", "convert"} < found.keys()
    # Others read what the first run leaves.
    lines = sorted(found.values(), key=lambda line: line[0] != "train")
    for line, (code, _, error) in zip(lines, run_several(lines), strict=True):
        assert code == 0, (line, error)


def _own(name: str, arguments: list[str], number: int) -> list[str]:
    """A documented line with folders and files of the test, and small."""
    run = f"run{number}" if name == "train" and any(".mesh." in a for a in arguments) else "run"
    if name == "train" and any("layout" in a or "source" in a for a in arguments):
        run = f"run{number}"
    places = {
        "--workdir=DIR": f"--workdir={run}",
        "--workdir=runs/first": f"--workdir={run}",
        "--workdir=runs/second": f"--workdir={run}",
        "--workdir=RUN": "--workdir=run",
        "--trace=TRACE": "--trace=trace.csv",
        "--output=FOLDER": "--output=exported",
        "--output_dir=DIR": "--output_dir=shards",
        "--config.data.source=docs": f"--config.data.source={ROOT / 'docs'}",
        "--config.train.steps=100": "--config.train.steps=2",
    }
    arguments = [places.get(argument, argument) for argument in arguments]
    if name == "prepare_data":  # its input is "..." on the page
        arguments = ["--input=text", *[a for a in arguments if not a.startswith("--input=")]]
    small = SMALL.get(name, [])
    if name == "train" and not any("devices" in a or ".mesh." in a for a in arguments):
        small = [*small, "--config.mesh.devices=1"]
    given = {argument.split("=")[0] for argument in arguments}
    return [*arguments, *[extra for extra in small if extra.split("=")[0] not in given]]
