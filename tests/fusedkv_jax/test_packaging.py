"""What the wheel holds, and the console command `fusedkv` run from it, without the checkout."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

import pytest

from tests.interop import smollm2

ROOT = pathlib.Path(__file__).parents[2]
FILES = ("pyproject.toml", "setup.cfg", "README.md", "LICENSE")
PACKAGES = ("fusedkv_jax", "pallas_kernels", "experiments")
LEFT_OUT = ("experiments/results/", "experiments/colab/")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: setuptools leaves folders behind, and packs what lies there."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    build = [sys.executable, "-c", BUILD, str(output)]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=300)
    (path,) = output.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs Python where only the unpacked wheel has our packages."""
    place, elsewhere = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("elsewhere")
    zipfile.ZipFile(wheel).extractall(place)
    # Somebody else's package of the same name, found first.
    (elsewhere / "experiments").mkdir()
    (elsewhere / "experiments" / "__init__.py").write_text("raise SystemExit('not ours')")
    path = os.pathsep.join((str(elsewhere), str(place)))

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=elsewhere,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_the_wheel_holds_what_is_imported_and_run(wheel):
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".json", ".html") or path.name == "py.typed"
    }
    expected = {name for name in expected if not name.startswith(LEFT_OUT)}
    archive = zipfile.ZipFile(wheel)
    found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected
    (points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "fusedkv = fusedkv_jax.__main__:main" in archive.read(points).decode()


def test_the_command_lists_its_programs_without_importing_them(installed):
    code = (
        "import sys; sys.argv = ['fusedkv', '--help']; from fusedkv_jax import __main__ as command;"
        "code = command.main(); assert not {'jax', 'numpy', 'absl'} & set(sys.modules);"
        "print(command.__file__); sys.exit(code)"
    )
    result = installed("-c", code)
    assert (result.returncode, result.stderr) == (0, "")
    assert not result.stdout.splitlines()[-1].startswith(str(ROOT))
    listed = dict(re.findall(r"^  (\w+) +(\S.*)$", result.stdout, re.MULTILINE))
    assert {"train", "generate", "evaluate", "convert", "describe"} <= set(listed)
    assert listed["train"] == "Train a model"
    assert not any("python -m" in summary for summary in listed.values())


def test_the_command_runs_a_program_as_python_does(installed):
    arguments = ("--layout=fusedkv", "--num_layers=4")
    result = installed("-m", "fusedkv_jax", "describe", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    module = [sys.executable, "-m", "experiments.describe", *arguments]
    expected = subprocess.run(module, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.stdout == expected.stdout
    assert "K 0 & 1" in result.stdout


def test_a_mistake_is_one_line(installed):
    result = installed("-m", "fusedkv_jax", "inspekt")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "fusedkv: error: no program 'inspekt'; did you mean inspect?\n"
    result = installed("-m", "fusedkv_jax", "describe", "--laiout=cla")
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown flag --laiout")


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A new environment with the wheel, and what it depends on as it is here; not the checkout."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    options = ["--no-deps", "--no-index", "--ignore-installed", "--quiet"]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, timeout=300)
    # A path alone: what names the checkout are .pth files in that folder, which are not read so.
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place


@pytest.mark.slow
def test_the_wheel_trains_and_writes(environment, tmp_path):
    """The console command in its own environment: from a text file to generated text."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    place = {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}

    def fusedkv(*arguments):
        done = subprocess.run(
            [str(environment / "bin" / "fusedkv"), *arguments],
            cwd=tmp_path,
            env=kept | place,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    ask = "import fusedkv_jax, experiments; print(fusedkv_jax.__file__, experiments.__file__)"
    python = [str(environment / "bin" / "python"), "-c", ask]
    where = subprocess.run(python, cwd=tmp_path, env=kept, capture_output=True, text=True).stdout
    assert where.count(str(environment)) == 2, where

    (tmp_path / "text.txt").write_text("The cache of the upper layers is not kept.\n" * 50)
    small = ("model.num_layers=4", "model.d_model=16", "model.d_ff=32", "data.seq_len=32")
    steps = ("train.steps=20", "data.holdout_fraction=0", "train.eval_batches=0")
    settings = [f"--config.{setting}" for setting in (*small, *steps, "data.source=text.txt")]
    trained = fusedkv("train", "--config=demo", "--workdir=run", *settings)
    assert json.loads(trained.splitlines()[-1])["step"] == 20
    written = fusedkv("generate", "--workdir=run", "--prompt=The", "--max_tokens=8")
    assert len(written) > 8
    assert "K 0 & 1" in fusedkv("describe", "--layout=fusedkv", "--num_layers=4")
    try:
        model = smollm2.path()
    except pytest.skip.Exception:
        return  # the rest needs an optional package
    prompt = "--prompt=The capital of France is"
    written = fusedkv("generate", f"--model={model}", prompt, "--temperature=0", "--max_tokens=4")
    assert "Paris" in written


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.tpu"])
def test_a_dockerfile_names_what_there_is(name):
    """It copies what the wheel is built from, past .dockerignore, and installs extras of ours."""
    text = (ROOT / "docker" / name).read_text()
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)
        for word in line.split()
    }
    assert copied == {*FILES, *PACKAGES, "constraints.txt"}
    admitted = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    assert admitted == copied
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {extra for found in re.findall(r"EXTRA=([\w,-]+)", text) for extra in found.split(",")}
    # What deploy/kubernetes/server.yaml runs can be built of either.
    assert "kv-events" in extras and extras <= project["optional-dependencies"].keys()
    assert "[$EXTRA]" in text
    (program,) = re.findall(r'^ENTRYPOINT \["(\w+)"\]$', text, re.MULTILINE)
    assert program in project["scripts"]
