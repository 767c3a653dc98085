"""The key/value cache: what is stored of each stream, and what attention reads of it."""

from typing import TYPE_CHECKING

from fusedkv_jax.lazy import lazy_names

__all__ = [
    "STORAGE_TYPES",
    "CachePlan",
    "KVCache",
    "Store",
    "cache_plan",
    "cache_shardings",
]

if TYPE_CHECKING:
    from fusedkv_jax.cache.cache import KVCache
    from fusedkv_jax.cache.plan import CachePlan, cache_plan
    from fusedkv_jax.cache.shardings import cache_shardings
    from fusedkv_jax.cache.storage_types import STORAGE_TYPES
    from fusedkv_jax.cache.stores import Store
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        __all__,
        {
            "cache": ["KVCache"],
            "plan": ["CachePlan", "cache_plan"],
            "shardings": ["cache_shardings"],
            "storage_types": ["STORAGE_TYPES"],
            "stores": ["Store"],
        },
    )
