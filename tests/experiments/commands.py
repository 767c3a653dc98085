"""Command lines of a binary, each run in a fork, so that a test imports the program once."""

import json
import subprocess
import sys

_FORK_EACH = """
import importlib, json, os, sys, tempfile
from experiments import cli
program = importlib.import_module(sys.argv[1])
program.define_flags()
results = []
for arguments in json.loads(sys.argv[2]):
    files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
    child = os.fork()
    if child == 0:
        for number, file in zip((1, 2), files):
            os.dup2(file.fileno(), number)
        sys.argv = [sys.argv[1], *arguments]
        try:
            cli.run(program.main)
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
    done = subprocess.run(
        [sys.executable, "-c", _FORK_EACH, f"experiments.{program}", json.dumps(command_lines)],
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
