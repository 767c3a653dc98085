"""What every binary shares: flags, --config, and errors as one line with exit code 2."""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import pathlib
import re
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from absl import flags, logging

from experiments.common import failures, helptext, parsing
from experiments.common.compilation import keep_compiled_programs
from experiments.common.failures import check_readable as check_readable
from experiments.common.failures import interrupt_answered as interrupt_answered
from experiments.common.outputs import check_output as check_output
from experiments.common.outputs import check_results_file as check_results_file
from experiments.common.overrides import apply_overrides
from experiments.common.parsing import only_with as only_with
from fusedkv_jax.validation import nearest_or_all

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from fusedkv_jax.mesh import MeshConfig
    from fusedkv_jax.training import ExperimentConfig

FLAGS = flags.FLAGS

_CONFIG_FOLDER = pathlib.Path(__file__).parents[1] / "configs"


def run(main: Callable[[], int | None], *, keep_programs: bool = True) -> NoReturn:
    """Parse the flags, call `main()` and exit with the code it returns (None is 0).

    Compiled programs are kept for the next run, unless `keep_programs` is false: for programs that
    measure compilation.

    A mistake of the user ends with one line on standard error and exit code 2, Ctrl-C with 130;
    `common.failures` says which failures are expected. Any other exception is a bug of ours and
    shows its traceback.
    """

    def call() -> int | None:
        rest, values = parsing.parse(_spell_out(sys.argv))
        if values["version"].value:
            print(f"fusedkv_jax {importlib.metadata.version('fusedkv_jax')}")
            return 0
        if values["help"].value:
            document = sys.modules[main.__module__].__doc__ or ""
            print(helptext.help_text(document, _settable()))
            return 0
        if rest[1:]:
            raise ValueError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
        if keep_programs:
            keep_compiled_programs()
        return main()

    logging.set_verbosity(logging.WARNING)
    failures.exit_with(call)


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


def load_config(
    change: "Callable[[ExperimentConfig], ExperimentConfig] | None" = None,
) -> "ExperimentConfig":
    """The experiment that --config names, with the overrides of the command line.

    Args:
      change: applied to what is named, before the overrides.

    Raises:
      ValueError: no such configuration, an unknown field or a bad value.
      FileNotFoundError: a path that does not exist.
    """
    if not FLAGS.config:
        raise ValueError(f"--config is missing; choose {', '.join(config_names())}, or a path")
    config = _named_config(FLAGS.config)
    return apply_overrides(change(config) if change else config, FLAGS.override)


def _named_config(name: str) -> "ExperimentConfig":
    from fusedkv_jax.training.config import ExperimentConfig

    module = _load_module(name)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config={name} defines no get_config() function")
    config = _run_config(name, module.get_config)
    if not isinstance(config, ExperimentConfig):
        raise ValueError(
            f"--config={name}: get_config() returned {type(config).__name__}, "
            "not an ExperimentConfig"
        )
    return config


def _run_config(name: str, call: Callable[[], object]) -> Any:
    """What a file of the user returns; a mistake in it is one line that names its place."""
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also sys.exit(), which would end as if all were well
        if isinstance(error, SyntaxError) and error.filename:
            where, text = f"{error.filename}:{error.lineno}", error.msg
        else:
            own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == name]
            where = f"{name}:{own[-1].lineno}" if own else name
            text = str(error)
        raise ValueError(f"--config={where}: {type(error).__name__}: {text}") from error


def define_mesh() -> None:
    """Define --mesh.AXIS=SIZE, for programs that need no --config."""
    flags.DEFINE_multi_string(
        "mesh",
        [],
        "AXIS=SIZE; the long form of --mesh.AXIS=SIZE. Axes are data, fsdp, context and tensor; "
        "data takes what the others leave. --mesh.devices=N uses the first N devices.",
    )


def load_mesh() -> "Mesh | None":
    """The mesh of the command line; None without --mesh.AXIS=SIZE, for one device.

    Raises:
      ValueError: an unknown axis, or sizes that the devices do not have.
    """
    from fusedkv_jax.sharding import make_mesh

    config = read_mesh()
    return config and make_mesh(config)


def read_mesh() -> "MeshConfig | None":
    """What --mesh.AXIS=SIZE says, before there are devices; None without it.

    Raises:
      ValueError: an unknown axis or a bad size.
    """
    from fusedkv_jax.mesh import MeshConfig

    if not FLAGS.mesh:
        return None
    placed = dataclasses.make_dataclass("Placed", [("mesh", MeshConfig)], frozen=True)
    try:
        chosen = apply_overrides(placed(MeshConfig()), [f"mesh.{each}" for each in FLAGS.mesh])
    except ValueError as error:
        raise ValueError(str(error).replace("--config.", "--")) from None
    return chosen.mesh


def config_names() -> list[str]:
    """The names that --config knows."""
    return sorted(p.stem for p in _CONFIG_FOLDER.glob("*.py") if not p.stem.startswith("_"))


def require(name: str) -> str:
    """The value of a string flag that must be given.

    Raises:
      ValueError: it was not.
    """
    value = FLAGS[name].value
    if not value:
        raise ValueError(f"--{name} is missing; {FLAGS[name].help}")
    return value


def _load_module(name: str) -> ModuleType:
    path = pathlib.Path(name).expanduser()
    if path.suffix == ".py":
        path = check_readable(path)
        spec = importlib.util.spec_from_file_location("experiment_config", path)
        assert spec is not None and spec.loader is not None
        module, loader = importlib.util.module_from_spec(spec), spec.loader
        _run_config(str(path), lambda: loader.exec_module(module))
        return module
    known = config_names()
    if name not in known:
        found = nearest_or_all(name, [*known, "a .py path"])
        raise ValueError(f"--config={name} is unknown{found}")
    return importlib.import_module(f"experiments.configs.{name}")


def _spell_out(argv: list[str]) -> list[str]:
    """--config.FIELD=VALUE and --mesh.AXIS=SIZE as values of flags."""
    if "mesh" in FLAGS:
        argv = [re.sub(r"^--?mesh\.", "--mesh=", arg) for arg in argv]
    if "config" in FLAGS:
        argv = [re.sub(r"^--?config\.", "--override=", arg) for arg in argv]
    return argv


def _settable() -> dict[str, object]:
    """The configurations whose fields the command line sets, for --help."""
    found: dict[str, object] = {}
    if "config" in FLAGS:
        from fusedkv_jax.training.config import ExperimentConfig

        default = FLAGS["config"].default
        found["config"] = _named_config(default) if default else ExperimentConfig
    if "mesh" in FLAGS:
        from fusedkv_jax.mesh import MeshConfig

        found["mesh"] = MeshConfig
    return found
