"""The key/value cache: what is stored of each stream, and what attention reads of it."""

from typing import TYPE_CHECKING

from fusedkv_jax.lazy import lazy_names

__all__ = [
    "EIGHT_BITS",
    "FLOATS",
    "STORAGE_TYPES",
    "CachePlan",
    "Call",
    "Group",
    "KVCache",
    "KiviStore",
    "Lane",
    "LinearStore",
    "PagedCall",
    "PagedStore",
    "MaskArguments",
    "Piece",
    "Reading",
    "RingStore",
    "Rotation",
    "Rows",
    "SequenceStore",
    "Slot",
    "Source",
    "StackedStore",
    "Storage",
    "Store",
    "StreamWeights",
    "View",
    "cache_plan",
    "cache_shardings",
    "check_int4",
    "check_paged",
    "constrain_cache",
    "copy_pages",
    "encode",
    "put_pages",
    "ring_positions",
    "select",
    "sequence_plan",
    "split_plan",
    "storage_of",
    "storage_type",
    "take_pages",
    "take_tokens",
    "unstacked",
    "write",
    "write_ring",
]

if TYPE_CHECKING:
    from fusedkv_jax.cache.cache import KVCache, check_int4, unstacked
    from fusedkv_jax.cache.calls import (
        Call,
        MaskArguments,
        Piece,
        Reading,
        Rotation,
        Rows,
        Source,
        StreamWeights,
        View,
    )
    from fusedkv_jax.cache.kivi import KiviStore
    from fusedkv_jax.cache.paged import (
        Lane,
        PagedCall,
        PagedStore,
        check_paged,
        copy_pages,
        put_pages,
        take_pages,
    )
    from fusedkv_jax.cache.plan import CachePlan, Group, cache_plan, sequence_plan, split_plan
    from fusedkv_jax.cache.sequence import SequenceStore
    from fusedkv_jax.cache.shardings import cache_shardings, constrain_cache
    from fusedkv_jax.cache.stacked import StackedStore
    from fusedkv_jax.cache.storage import (
        Slot,
        Storage,
        encode,
        ring_positions,
        select,
        storage_type,
        take_tokens,
        write,
        write_ring,
    )
    from fusedkv_jax.cache.storage_types import EIGHT_BITS, FLOATS, STORAGE_TYPES
    from fusedkv_jax.cache.stores import LinearStore, RingStore, Store, storage_of
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        __all__,
        {
            "cache": ["KVCache", "check_int4", "unstacked"],
            "calls": [
                "Call",
                "MaskArguments",
                "Piece",
                "Reading",
                "Rotation",
                "Rows",
                "Slot",
                "Source",
                "StreamWeights",
                "View",
            ],
            "kivi": ["KiviStore"],
            "paged": [
                "Lane",
                "PagedCall",
                "PagedStore",
                "check_paged",
                "copy_pages",
                "put_pages",
                "take_pages",
            ],
            "plan": ["CachePlan", "Group", "cache_plan", "sequence_plan", "split_plan"],
            "sequence": ["SequenceStore"],
            "shardings": ["cache_shardings", "constrain_cache"],
            "stacked": ["StackedStore"],
            "storage": [
                "Slot",
                "Storage",
                "encode",
                "ring_positions",
                "select",
                "storage_type",
                "take_tokens",
                "write",
                "write_ring",
            ],
            "storage_types": ["EIGHT_BITS", "FLOATS", "STORAGE_TYPES"],
            "stores": ["LinearStore", "RingStore", "Store", "storage_of"],
        },
    )
