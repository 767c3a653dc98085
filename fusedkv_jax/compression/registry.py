"""Compressors by name, for the command line: `snapkv:budget=1024,window=16`."""

from __future__ import annotations

import dataclasses

from fusedkv_jax import compression
from fusedkv_jax.validation import nearest_or_all

# Classes by name, so that the names cost no import of them.
_REGISTRY = {
    "snapkv": "SnapKV",
    "pyramidkv": "PyramidKV",
    "pyramidinfer": "PyramidInfer",
    "minicache": "MiniCache",
    "double_sparsity": "DoubleSparsity",
    "streaming_llm": "StreamingLLM",
    "h2o": "H2O",
}


def names() -> tuple[str, ...]:
    """The compressors that `parse` knows."""
    return tuple(_REGISTRY)


def parse(spec: str) -> compression.Compressor:
    """Build a compressor from text: a name, or `name:field=value,field=value`.

    Raises:
        CompressionError: an unknown name or field (the nearest are suggested), or a bad value.
    """
    if not isinstance(spec, str):
        raise compression.CompressionError(
            f"compressor={spec!r}; use text such as snapkv:budget=64"
        )
    name, colon, text = spec.partition(":")
    if name not in _REGISTRY:
        raise compression.CompressionError(
            f"unknown compressor {name!r}{nearest_or_all(name, _REGISTRY)}"
        )
    found: type[compression.Compressor] = getattr(compression, _REGISTRY[name])
    # What calibration finds is no text.
    known = [f.name for f in dataclasses.fields(found) if f.name != "channels"]
    options = {}
    for part in text.split(",") if colon else ():
        field, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise compression.CompressionError(
                f"compressor {spec!r}: write fields as name:field=value"
            )
        if field not in known:
            raise compression.CompressionError(
                f"compressor {name!r} has no {field!r}{nearest_or_all(field, known)}"
            )
        if field in options:
            raise compression.CompressionError(f"compressor {spec!r} sets {field} twice; keep one")
        options[field] = _value(value)
    return found(**options)


def _value(text: str) -> str | int | float | bool | None:
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
