"""Layouts as data: which layer caches its keys and values, and which layers read them instead."""

from fusedkv_jax.layouts.algebra import (
    KINDS,
    Kind,
    KVLayout,
    LayerKV,
    LayoutError,
    Mixing,
    Stream,
    reuse,
)
from fusedkv_jax.layouts.drawing import draw
from fusedkv_jax.layouts.grammar import format, fused, parse
from fusedkv_jax.layouts.grouping import Run, exported, runs
from fusedkv_jax.layouts.named import get, has_name, names, ordinary, register, resolve

__all__ = [
    "KINDS",
    "KVLayout",
    "Kind",
    "LayerKV",
    "LayoutError",
    "Mixing",
    "Run",
    "Stream",
    "draw",
    "exported",
    "format",
    "fused",
    "get",
    "has_name",
    "names",
    "ordinary",
    "parse",
    "register",
    "resolve",
    "reuse",
    "runs",
]
