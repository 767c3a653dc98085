"""Plain code instead of fast code: it compiles in a third of the time, and most tests are that."""

from collections.abc import Mapping
from importlib.metadata import version

# Fusions by LLVM alone, without MLIR before it.
_FLAG = "--xla_cpu_use_fusion_emitters=false"
_KNOWN = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)  # later ones stop at it

# Of `jax.jit`: code as users have it, whatever `xla_flags` asks for.
FAST = {"xla_cpu_use_fusion_emitters": True} if _KNOWN else {}


def xla_flags(environment: Mapping[str, str]) -> str:
    """XLA_FLAGS that go with JAX_DISABLE_MOST_OPTIMIZATIONS; unchanged where it is not set."""
    flags = environment.get("XLA_FLAGS", "")
    plain = environment.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "").lower() in ("1", "true")
    return f"{flags} {_FLAG}".strip() if plain and _KNOWN and _FLAG not in flags else flags
