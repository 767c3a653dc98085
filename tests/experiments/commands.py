"""Command lines of the programs, each run in a fork, so that a test imports a program once."""

import json
import pathlib
import subprocess
import sys

_FOLDER = pathlib.Path(__file__).parents[2] / "experiments"
PROGRAMS = sorted(path.stem for path in _FOLDER.glob("*.py") if "cli.run(" in path.read_text())

_FORK_EACH = """
import importlib, json, os, sys, tempfile
from absl import flags
from experiments.common import cli
lines = json.loads(sys.argv[1])
programs = {name: importlib.import_module(name) for name, _ in lines}

def watch_reads():
    # A flag that was given and that nothing looked at has been ignored.
    read, value = set(), flags.Flag.value
    def get(flag):
        read.add(flag.name)
        return value.fget(flag)
    flags.Flag.value = property(get, value.fset)
    return read

def only_read():
    # All that a command line says is read, and the configuration is built; nothing runs.
    if "config" in flags.FLAGS and flags.FLAGS.config:
        cli.load_config()
    if "mesh" in flags.FLAGS:
        cli.read_mesh()
only_read.__module__ = "experiments.common.cli"

def run(program, arguments):
    sys.argv = [program.__name__, *arguments]
    program.define_flags()
    main = program.main
    if sys.argv.count("--only-read"):
        sys.argv.remove("--only-read")
        cli.run(only_read)
    def watched():
        read = watch_reads()
        code = main()
        given = {name for name in flags.FLAGS if flags.FLAGS[name].present}
        assert given <= read, f"flags that nothing read: {given - read}"
        return code
    watched.__module__ = main.__module__
    cli.run(watched)

results = []
for name, arguments in lines:
    files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
    child = os.fork()
    if child == 0:
        for number, file in zip((1, 2), files):
            os.dup2(file.fileno(), number)
        try:
            run(programs[name], arguments)
        except SystemExit as end:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(end.code or 0)
        except BaseException as error:
            os.write(2, b"TRACEBACK " + repr(error).encode())
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read().decode())
    results.append([code, *texts])
print(json.dumps(results))
"""


def run(program: str, *command_lines: list[str]) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of `experiments.PROGRAM` for each line."""
    return run_several([(program, line) for line in command_lines])


def run_several(command_lines: list[tuple[str, list[str]]]) -> list[tuple[int, str, str]]:
    """The same of several programs.

    A program that ends well without having looked at a flag that it was given fails instead.
    """
    lines = [(f"experiments.{program}", arguments) for program, arguments in command_lines]
    done = subprocess.run(
        [sys.executable, "-c", _FORK_EACH, json.dumps(lines)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(result) for result in json.loads(done.stdout.splitlines()[-1])]


def check_mistakes(program: str, cases: list[tuple[list[str], str]]) -> None:
    """Each command line ends with one line on standard error that holds the text, and code 2."""
    results = run(program, *(arguments for arguments, _ in cases))
    for (arguments, message), (code, out, error) in zip(cases, results, strict=True):
        assert (code, out) == (2, ""), (arguments, out, error)
        assert error.startswith("error: ") and error.count("\n") == 1, (arguments, error)
        assert message in error, (arguments, error)
