"""Names of packages that are imported at their first use."""

import ast
import importlib
import pathlib

import pytest

import fusedkv_jax

ROOT = pathlib.Path(fusedkv_jax.__file__).parents[1]
LAZY = [
    path.parent.relative_to(ROOT)
    for folder in ("fusedkv_jax", "pallas_kernels")
    for path in sorted((ROOT / folder).rglob("__init__.py"))
    if "TYPE_CHECKING" in path.read_text()
]


@pytest.mark.parametrize("folder", LAZY, ids=str)
def test_names_are_what_the_type_checker_sees(folder):
    name = ".".join(folder.parts)
    package = importlib.import_module(name)
    tree = ast.parse((ROOT / folder / "__init__.py").read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If)).body
    seen = {
        alias.name: node.module
        for node in checked
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(seen) <= set(package.__all__)
    for each, module in seen.items():
        if module == name:
            assert getattr(package, each) is importlib.import_module(f"{name}.{each}")
        else:
            assert getattr(package, each) is getattr(importlib.import_module(module), each)
            # A module of that name would take the place of what is meant.
            assert importlib.util.find_spec(f"{name}.{each}") is None
    assert all(hasattr(package, each) for each in package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing_of_the_kind'"):
        _ = package.nothing_of_the_kind


def test_there_are_lazy_packages():
    assert {pathlib.Path("fusedkv_jax"), pathlib.Path("fusedkv_jax/training")} <= set(LAZY)
    assert "generate" in dir(fusedkv_jax) and fusedkv_jax.sharding.AXES
