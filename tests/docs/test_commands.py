"""Every command of the documentation is known, and reads all of its flags."""

import ast
import fnmatch
import functools
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from fusedkv_jax.__main__ import programs
from tests.docs.documented import (
    PAGES,
    ROOT,
    Command,
    commands,
    everything,
    fences,
    placed,
    program_line,
    settings,
    split,
)
from tests.experiments.commands import run_several

# Programs of others that cannot be had here: what they start is checked, their own flags are not.
ELSEWHERE = {
    "docker": "needs a daemon and images",
    "gcloud": "needs an account and TPUs",
    "kubectl": "needs a cluster",
    "mpirun": "needs Open MPI",
    "scontrol": "needs a Slurm cluster",
    "serve": "tests/deploy/test_ray_serve.py runs it where Ray is installed",
    "srun": "needs a Slurm cluster",
    "vllm-router": "tests/server/test_router.py runs it where it is installed",
    "[": "the exit code of a command above it",
    "cd": "the folder of a clone on another machine",
}
# Devices of the run that a page speaks of, for commands whose mesh is over several machines.
DEVICES = {
    "docs/guides/commands.md": {"*--config.mesh.fsdp=4*": 8},
    "docs/guides/clusters.md": {
        "*--num_processes=2*": 2,  # two machines with a device each
        "*--config.mesh.fsdp=8*": 4 * 8,  # Slurm: four nodes of eight GPUs
        "*/shared/run --config.data.batch_size=32": 4 * 8,  # Kubernetes: the same
        "*--config.mesh.fsdp=-1*": 64,  # v5p-128: 64 chips
        "*/shared/run --config.data.batch_size=4": 4,  # Open MPI: a GPU a node
    },
}


def test_every_flag_and_field_of_every_command_is_known(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text("from experiments.configs.demo import get_config\n")
    lines = {str(command): found for command in everything() if (found := program_line(command))}
    for path in PAGES:
        for setting in settings(path):
            if "=SIZE" not in setting:
                lines[f"{path.name}: {setting}"] = ("train", ["--config=demo", setting])
    # The quick ones of the README are run as they are written.
    quick = [
        text for text, (name, _) in lines.items() if re.match(r"README.*\b(describe|costs)\b", text)
    ]
    assert len(quick) >= 3 and {name for name, _ in lines.values()} >= set(programs())
    read = [
        (
            name,
            placed(arguments, config)
            if text in quick
            else ["--only-read", *placed(arguments, config)],
        )
        for text, (name, arguments) in lines.items()
    ]
    for text, (code, _, error) in zip(lines, run_several(read), strict=True):
        assert code == 0, (text, error)


def test_a_command_with_a_mistake_is_found():
    mistakes = (
        "python -m experiments.train --config=demo --config.model.layers=3\nfusedkv costs --no=1"
    )
    lines = [program_line(command) for command in split(mistakes, "")]
    found = run_several([(name, ["--only-read", *rest]) for name, rest in lines])
    assert [code for code, _, _ in found] == [2, 2]
    for wrong in (
        "make tests",
        "make test MARK=slow",
        "make test ARGS=tests/modle",
        "make test ARGS=--evry=3",
        "pip install '.[gpus]'",
        "pip install fusedkv_jax",
        "python -m tests.golden",
        "curl localhost:8000/v2 -d '{}'",
        "FUSEDKV_KILL=3 make test",
        "ls",
    ):
        (command,) = split(wrong, "")
        assert problem(command, _options()), wrong


def test_every_other_command_is_known(request):
    met, options = set(), _options(request.config)
    for command in everything():
        if command.words[0] in ELSEWHERE:
            met.add(command.words[0])
        else:
            assert not (found := problem(command, options)), f"{command}: {found}"
    assert met == set(ELSEWHERE), "no page has the others any more: take them out of ELSEWHERE"


def _options(config: pytest.Config | None = None) -> set[str]:
    """The options of pytest that the Makefile's ARGS may have."""
    if config is None:
        return {"-x", "--every", "--first"}
    parser = config._parser
    groups = [*parser._groups, parser._anonymous]
    return {name for group in groups for option in group.options for name in option.names()}


def problem(command: Command, options: set[str]) -> str:
    """What is wrong with a command; empty if nothing is."""
    for setting in command.settings:
        name = setting.split("=")[0]
        if name.startswith("FUSEDKV_") and name not in _words_of_sources():
            return f"nothing reads {name}"
    first, *rest = command.words
    checks = {"make": _problem_of_make, "pip": _problem_of_pip, "curl": _problem_of_curl}
    if first == "make":
        return _problem_of_make(rest, options)
    if first in checks:
        return checks[first](rest)
    if first.endswith("python"):
        found = rest[:1] == ["-m"] and importlib.util.find_spec(rest[1])
        return _problem_of_lm_eval(rest) if found else f"no module {rest[1:2]}"
    if first == "fusedkv":
        return "" if rest[0] in (*programs(), "--help") else "no such program"
    if first == "lm_eval":
        return _problem_of_lm_eval(rest)
    if first == ".ci/run":
        return "" if os.access(ROOT / first, os.X_OK) else "cannot be executed"
    name = first.removeprefix(".venv/bin/")
    here = os.path.dirname(sys.executable)
    return "" if shutil.which(name, path=here) else f"{name} is not in the environment"


def _words_of_sources() -> set[str]:
    paths = [path for folder in ("tests", "experiments") for path in (ROOT / folder).rglob("*.py")]
    own = pathlib.Path(__file__)
    return {
        word
        for path in paths
        if path != own
        for word in re.findall(r"\bFUSEDKV_\w+", path.read_text(encoding="utf-8"))
    }


def _problem_of_make(words: list[str], options: set[str]) -> str:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = re.findall(r"^(\w+) \?=", makefile, re.M)
    targets = re.search(r"^\.PHONY: (.*)", makefile, re.M)[1].split()
    if unknown := {word for word in words if "=" not in word} - set(targets):
        return f"the Makefile has no target {unknown}"
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if unknown := given.keys() - set(known):
        return f"the Makefile has no variable {unknown}"
    dry = ["make", "--dry-run", "--directory", str(ROOT), f"PYTHON={sys.executable}"]
    # What ARGS and PYTHON are does not change what make would do.
    mine = [word for word in words if not word.startswith(("ARGS=", "PYTHON="))]
    if error := _error_of((*dry, *mine)):
        return error
    extras = given.get("EXTRAS", "").split(",")
    if unknown := set(filter(None, extras)) - _extras().keys():
        return f"no extra {unknown}"
    for word in given.get("ARGS", "").split() if "test" in words else ():
        if word.startswith("-"):
            if word.split("=")[0] not in options:
                return f"pytest has no {word}"
        elif not (ROOT / word).exists():
            return f"no file {word}"
    return ""


@functools.cache
def _error_of(line: tuple[str, ...]) -> str:
    done = subprocess.run(line, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def _extras() -> dict[str, list[str]]:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"]


def _problem_of_pip(words: list[str]) -> str:
    """There is no package of our name in an index: extras are those of the folder."""
    required = {
        re.split(r"[^\w-]", entry)[0] for entries in _extras().values() for entry in entries
    }
    for word in words[1:]:
        match = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", word)
        if match and set(filter(None, (match[1] or "").split(","))) <= _extras().keys():
            continue
        if match or word not in required or word == "fusedkv_jax":
            return f"{word} is nothing that can be installed"
    return "" if words[0] == "install" and words[1:] else "only pip install"


def _problem_of_curl(words: list[str]) -> str:
    from fusedkv_jax.server import protocol

    forms = {
        "/v1/completions": protocol.CompletionRequest,
        "/v1/chat/completions": protocol.ChatRequest,
    }
    route = "/" + words[0].partition("/")[2]
    if route not in forms:
        return f"no route {route}"
    body = words[words.index("-d") + 1]
    known = forms[route].__struct_fields__
    protocol.decode(body.encode(), forms[route])
    return "" if set(json.loads(body)) <= {*known} else f"fields that are not {known}"


def _problem_of_lm_eval(words: list[str]) -> str:
    """The arguments of our model; the other flags are lm-eval's own."""
    if "--model_args" not in words:
        return ""
    source = (ROOT / "fusedkv_jax/evaluation/lm_eval.py").read_text(encoding="utf-8")
    (made,) = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    ]
    given = words[words.index("--model_args") + 1].split(",")
    unknown = {part.split("=")[0] for part in given} - {argument.arg for argument in made.args.args}
    return f"the model has no argument {unknown}" if unknown else ""


def test_runs_of_several_machines_fit_their_devices():
    """What training checks with the devices at hand, for the devices that a page speaks of."""
    from experiments.common.overrides import apply_overrides
    from experiments.configs.demo import get_config
    from fusedkv_jax.mesh import AXES

    for page, patterns in DEVICES.items():
        lines = [c for c in commands(ROOT / page) if (program_line(c) or ("",))[0] == "train"]
        for pattern, count in patterns.items():
            chosen = [line for line in lines if fnmatch.fnmatch(shlex.join(line.words), pattern)]
            assert chosen, f"{page} has no command {pattern} any more"
            for line in chosen:
                changes = [w[9:] for w in line.words if w.startswith("--config.")]
                config = apply_overrides(get_config(), changes)
                sizes = dict(zip(AXES, config.mesh.sizes(count), strict=True))
                assert config.data.batch_size % (sizes["data"] * sizes["fsdp"]) == 0, str(line)
    several = [c for c in commands(ROOT / "docs/guides/clusters.md") if program_line(c)]
    patterns = DEVICES["docs/guides/clusters.md"]
    for line in several:
        text = shlex.join(line.words)
        assert any(fnmatch.fnmatch(text, pattern) for pattern in patterns), text


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_code_stands_in_fences_that_name_its_language(page):
    languages = {fence.language for fence in fences(page)}
    assert languages <= {"sh", "python", "text", "yaml", "diff"}, languages
    prose = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert not re.search(r"\n\n {4,}(python|make|pip|import|from) \S", prose)
