"""The console command: `fusedkv PROGRAM ...` is `python -m experiments.PROGRAM ...`.

Programs are found as files and imported when they are run, so that the list of them comes at once.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import pathlib
import runpy
import sys

from fusedkv_jax.validation import nearest

# Beside this package in the checkout and in an installation alike.
_FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
_GUARD = 'if __name__ == "__main__":'


def main() -> int:
    """Run the program that the command line names; returns the exit code of a list or a mistake."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "-help", "--help", "help"):
        print(_overview())
        return 0
    name = arguments[0]
    if name in ("-version", "--version"):
        print(f"fusedkv_jax {importlib.metadata.version('fusedkv_jax')}")
        return 0
    if name not in programs():
        hint = nearest(name, programs()) or "; `fusedkv --help` lists them"
        print(f"fusedkv: error: no program {name!r}{hint}", file=sys.stderr)
        return 2
    del sys.argv[1]
    _import_ours()
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    return 0


def programs() -> list[str]:
    """Names of what `fusedkv` runs: the modules of `experiments` that are programs."""
    return sorted(
        path.stem for path in _FOLDER.glob("*.py") if _GUARD in path.read_text(encoding="utf-8")
    )


def _overview() -> str:
    rows = ((name, _summary(_FOLDER / f"{name}.py")) for name in programs())
    return "\n".join(
        [
            "usage: fusedkv PROGRAM [--flag=value ...]",
            "",
            "Language models whose upper layers store no KV cache. Programs:",
            *(f"  {name:<16} {summary}" for name, summary in rows),
            "",
            "`fusedkv PROGRAM --help` lists its flags; `fusedkv --version` shows the version.",
        ]
    )


def _summary(path: pathlib.Path) -> str:
    """What a program does: the first sentence of its docstring, without the command."""
    document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return document.partition("\n")[0].partition(": python -m")[0].rstrip(".")


def _import_ours() -> None:
    """Import `experiments` from our folder: a user may have one on the path that is not ours."""
    spec = importlib.util.spec_from_file_location(
        "experiments", _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
    )
    if spec is None or spec.loader is None or not _FOLDER.is_dir():
        raise ImportError(f"{_FOLDER} is missing; install fusedkv_jax again")
    module = sys.modules["experiments"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    sys.exit(main())
