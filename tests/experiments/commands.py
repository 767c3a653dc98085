"""Command lines of the programs: in a fork, so that a test imports them once, or right here."""

import contextlib
import importlib
import io
import json
import pathlib
import subprocess
import sys
from unittest import mock

from absl import flags

from experiments.common import cli, failures, parsing

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

def own_modules():
    packages = ("experiments.", "fusedkv_jax", "pallas_kernels")
    return [name for name in sys.modules if name.startswith(packages)]

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
    # What a program imports when it needs it, the next one finds: that is most of a short run.
    files = [tempfile.TemporaryFile() for _ in range(3)]
    child = os.fork()
    if child == 0:
        for number, file in zip((1, 2), files):
            os.dup2(file.fileno(), number)
        code = 1
        try:
            run(programs[name], arguments)
        except SystemExit as end:
            sys.stdout.flush(), sys.stderr.flush()
            code = end.code or 0
        except BaseException as error:
            os.write(2, b"TRACEBACK " + repr(error).encode())
        os.write(files[2].fileno(), " ".join(own_modules()).encode())
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read().decode())
    for module in texts.pop().split():
        importlib.import_module(module)
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


class Refused(Exception):
    """What a program would write to standard error, ending with code 2."""


def run_here(program: str, *command_lines: list[str]) -> list[str]:
    """Standard output of each line, run in this process.

    What the first one compiles serves the others, and the test around them. Devices are the tests'.

    Raises:
      Refused: a line is a mistake.
    """
    module, found = importlib.import_module(f"experiments.{program}"), []
    for line in command_lines:
        read, value = set(), flags.Flag.value

        def get(flag, read=read, value=value):
            read.add(flag.name)
            return value.fget(flag)

        with (
            mock.patch.dict(parsing._RULES, clear=True),
            mock.patch.object(sys, "argv", [module.__name__, *line]),
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()),
        ):
            module.define_flags()
            try:
                parsing.parse(cli._spell_out(sys.argv))
                with mock.patch.object(flags.Flag, "value", property(get, value.fset)):
                    assert not module.main()
            except Exception as error:
                message = failures.explain(error)
                if message is None:
                    raise
                raise Refused(message) from error
            finally:
                # Not by absl's flagsaver: libraries that are imported meanwhile keep theirs.
                present = {name for name, flag in parsing.own_flags().items() if flag.present}
                for name in parsing.own_flags():
                    delattr(flags.FLAGS, name)
            assert present <= read, f"flags that nothing read: {present - read}"
        found.append(out.getvalue())
    return found


def check_mistakes(program: str, cases: list[tuple[list[str], str]]) -> None:
    """Each command line ends with one line on standard error that holds the text, and code 2."""
    results = run(program, *(arguments for arguments, _ in cases))
    for (arguments, message), (code, out, error) in zip(cases, results, strict=True):
        assert (code, out) == (2, ""), (arguments, out, error)
        assert error.startswith("error: ") and error.count("\n") == 1, (arguments, error)
        assert message in error, (arguments, error)
