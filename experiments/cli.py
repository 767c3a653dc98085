"""What every binary shares: flags, --config, and errors as one line with exit code 2."""

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging
from jax.sharding import Mesh

import experiments
import fusedkv_jax
import pallas_kernels
from experiments.overrides import apply_overrides
from fusedkv_jax.sharding import MeshConfig, make_mesh
from fusedkv_jax.training import ExperimentConfig

USER_ERROR_EXIT_CODE = 2

_CONFIG_FOLDER = pathlib.Path(__file__).parent / "configs"
_OUR_FOLDERS = tuple(
    pathlib.Path(folder)
    for package in (experiments, fusedkv_jax, pallas_kernels)
    for folder in package.__path__
)


def run(main: Callable[..., int | None], *, argument: str | None = None) -> NoReturn:
    """Parse the flags, call `main()` and exit with the code it returns (None is 0).

    With `argument`, the name of a required word on the command line, `main` is called with it.

    A mistake of the user ends with one line on standard error and exit code 2: a bad or unknown
    flag, a missing file, and a ValueError that our own code raised. A ValueError from inside a
    library is a bug of ours and shows its traceback, as any other exception does.
    """

    def call_main(argv: Sequence[str]) -> int | None:
        try:
            return main(*argv[1:])
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as e:
            _fail(f"{e.strerror}: {e.filename}" if e.filename else str(e))
        except (ValueError, flags.Error) as error:
            if not (isinstance(error, flags.Error) or _is_ours(error)):
                raise
            _fail(str(error))

    logging.set_verbosity(logging.WARNING)
    app.run(call_main, flags_parser=functools.partial(_parse_flags, argument))
    raise SystemExit  # app.run has exited already; this tells type checkers so


def define_config(default: str | None = None) -> None:
    """Define --config and, with it, --config.FIELD=VALUE for every field."""
    flags.DEFINE_string(
        "config",
        default,
        "The experiment: a name in experiments/configs "
        f"({', '.join(config_names())}) or the path of a Python file with get_config(). "
        "--config.FIELD=VALUE changes any field, for example --config.train.steps=100 or "
        "--config.model.layout=fusedkv_lite.",
    )
    flags.DEFINE_multi_string("override", [], "FIELD=VALUE; the long form of --config.FIELD=VALUE.")


def load_config() -> ExperimentConfig:
    """The experiment that --config names, with the overrides of the command line.

    Raises:
      ValueError: no such configuration, an unknown field or a bad value.
      FileNotFoundError: a path that does not exist.
    """
    if not flags.FLAGS.config:
        raise ValueError(f"--config is missing; choose {', '.join(config_names())}, or a path")
    module = _load_module(flags.FLAGS.config)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config={flags.FLAGS.config} defines no get_config() function")
    config = module.get_config()
    if not isinstance(config, ExperimentConfig):
        raise ValueError(
            f"--config={flags.FLAGS.config}: get_config() returned {type(config).__name__}, "
            "not an ExperimentConfig"
        )
    return apply_overrides(config, flags.FLAGS.override)


def define_mesh() -> None:
    """Define --mesh.AXIS=SIZE, for programs that need no --config."""
    flags.DEFINE_multi_string(
        "mesh",
        [],
        "AXIS=SIZE; the long form of --mesh.AXIS=SIZE. Axes are data, fsdp, context and tensor; "
        "data takes what the others leave. --mesh.devices=N uses the first N devices.",
    )


def load_mesh() -> Mesh | None:
    """The mesh of the command line; None without --mesh.AXIS=SIZE, for one device.

    Raises:
      ValueError: an unknown axis, or sizes that the devices do not have.
    """
    if not flags.FLAGS.mesh:
        return None
    try:
        chosen = apply_overrides(_Placed(), [f"mesh.{override}" for override in flags.FLAGS.mesh])
    except ValueError as error:
        raise ValueError(str(error).replace("--config.", "--")) from None
    return make_mesh(chosen.mesh)


@dataclasses.dataclass(frozen=True)
class _Placed:
    mesh: MeshConfig = MeshConfig()


def config_names() -> list[str]:
    """The names that --config knows."""
    return sorted(p.stem for p in _CONFIG_FOLDER.glob("*.py") if not p.stem.startswith("_"))


def require(name: str) -> str:
    """The value of a string flag that must be given.

    Raises:
      ValueError: it was not.
    """
    value = flags.FLAGS[name].value
    if not value:
        raise ValueError(f"--{name} is missing; {flags.FLAGS[name].help}")
    return value


def _load_module(name: str):
    path = pathlib.Path(name).expanduser()
    if path.suffix == ".py":
        if not path.is_file():
            raise ValueError(f"--config={name}: there is no such file")
        spec = importlib.util.spec_from_file_location("experiment_config", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    known = config_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(known)}, or a .py path"
        raise ValueError(f"--config={name} is unknown; {hint}")
    return importlib.import_module(f"experiments.configs.{name}")


def _parse_flags(argument: str | None, argv: list[str]) -> list[str]:
    """Parse with absl, after turning --config.FIELD=VALUE and --mesh.AXIS=SIZE into flags."""
    if "mesh" in flags.FLAGS:
        argv = [re.sub(r"^--?mesh\.", "--mesh=", arg) for arg in argv]
    if "config" in flags.FLAGS:
        argv = [re.sub(r"^--?config\.", "--override=", arg) for arg in argv]
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        _fail(str(error))
    taken = 1 if argument is None else 2
    if len(rest) > taken:
        _fail(f"unexpected argument {rest[taken]!r}; flags are written --name=value")
    if len(rest) < taken:
        _fail(f"{argument} is missing; name it after the command")
    return rest


def _is_ours(error: Exception) -> bool:
    """Whether the statement that raised the error is in one of our packages."""
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = pathlib.Path(frames[-1].filename)
    return any(raised_in.is_relative_to(folder) for folder in _OUR_FOLDERS)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(USER_ERROR_EXIT_CODE)
