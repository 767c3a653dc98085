"""What targets of the Makefile would run."""

import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def make_chat(given: str = "") -> list[str]:
    """The flags that `make chat ARGS=given` hands to the program, beside the model."""
    settings = [f"PYTHON={sys.executable}", "MODEL=a", f"ARGS={given}"]
    command = ["make", "--dry-run", "--directory", str(ROOT), "chat", *settings]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    program = run.stdout.partition("experiments.generate --chat --model=")[2]
    return shlex.split(program.replace("\\\n", " ").partition("\n")[0])[1:]
