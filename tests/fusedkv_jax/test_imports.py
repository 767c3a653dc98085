"""Every module can be imported, with whatever versions of jax and flax are there."""

import importlib
import pkgutil
from collections.abc import Iterator

PACKAGES = ("fusedkv_jax", "pallas_kernels", "experiments")


def _modules(package: str, path: str) -> Iterator[str]:
    """From the files, as `walk_packages` ends at a package that cannot be imported."""
    for module in pkgutil.iter_modules([path]):
        name = f"{package}.{module.name}"
        yield name
        if module.ispkg:
            yield from _modules(name, f"{path}/{module.name}")


def test_every_module_can_be_imported() -> None:
    broken = {}
    for package in PACKAGES:
        for name in _modules(package, importlib.import_module(package).__path__[0]):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name is None or error.name.partition(".")[0] in PACKAGES:
                    broken[name] = error  # others are optional
            except Exception as error:
                broken[name] = error
    assert not broken
