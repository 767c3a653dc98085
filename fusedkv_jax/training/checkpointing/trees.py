"""Trees as a checkpoint holds them: plain dictionaries, named paths, target devices."""

from typing import TypeGuard

import jax
from flax import nnx
from jaxtyping import PyTree


def describe(tree: PyTree) -> dict[str, str]:
    """Path -> "dtype[shape]" of every array of a tree."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in leaves
    }


def is_state(node: object) -> TypeGuard[nnx.State]:
    return isinstance(node, nnx.State)


def plain(tree: PyTree) -> PyTree:
    """The tree with every nnx.State as nested dictionaries of arrays.

    So what is on disk does not depend on how a version of Flax wraps its variables.
    """
    return jax.tree.map(
        lambda node: nnx.to_pure_dict(node) if is_state(node) else node,
        tree,
        is_leaf=is_state,
    )


def unplain(abstract: PyTree, plain: PyTree) -> PyTree:
    """Reverse `plain`, given a tree with the structure that is wanted."""

    def restore(node: PyTree, value: PyTree) -> PyTree:
        if not is_state(node):
            return value
        state = jax.tree.map(lambda leaf: leaf, node)  # a copy: the next call changes it
        nnx.replace_by_pure_dict(state, value)
        return state

    return jax.tree.map(restore, abstract, plain, is_leaf=is_state)


def with_sharding(tree: PyTree, shardings: PyTree = None) -> PyTree:
    """Say where each abstract array goes: as in `shardings` or its own; else the default device.

    That is one of this process: each of several processes then has all of the array.
    """
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if shardings is None:
        shardings = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None) or default, tree)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        shardings,
    )
