"""The type of what stands in JAX's trees; `jaxtyping.PyTree` is a whole one, of any structure.

A dataclass that is a pytree says what it holds in a program. JAX rebuilds it around tracers,
shapes, shardings and masks besides, so that only readers and static checkers may rely on that.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax import Array as Leaf
else:
    Leaf = object

__all__ = ["Leaf"]
