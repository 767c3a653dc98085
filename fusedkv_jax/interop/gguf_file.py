"""The container format GGUF: metadata and tensors of one file, which is not trusted.

The header is read here and not by the package `gguf`, whose reader believes the counts that a file
states and so runs out of memory on a file of a few bytes. Numbers are dequantized by the package.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MOST_AXES = 4
_MOST_HEADER_BYTES = 1 << 28  # vocabularies of a million tokens take a tenth
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9


class GgufError(ValueError):
    """A GGUF file that cannot be read; the message names the file and what is wrong."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies.

    Attributes:
        shape: as NumPy orders axes: the last one is contiguous.
        kind: its type, a number of GGML's.
        offset: first byte, from the start of the file.
        size: bytes.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int
    size: int


class GgufFile(Mapping[str, np.ndarray]):
    """The tensors of a file by name, dequantized to float32 when they are asked for.

    Use as a context manager.

    Args:
        path: the file.

    Attributes:
        metadata: values by key: numbers, strings, arrays of numbers, and lists of strings.

    Raises:
        GgufError: damaged, or not a GGUF file of version 2 or 3.
        ImportError: the package `gguf` is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self._gguf = _package()
        if not self.path.is_file():
            problem = "is not a regular file" if self.path.exists() else "does not exist"
            raise GgufError(f"{self.path} {problem}; name a .gguf file")
        with self.path.open("rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            if self._size < 24:
                raise self._damaged("is too short for a GGUF file")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.metadata, self._places = self._read()
        except BaseException:
            self._bytes.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bytes.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._places[name]
        kind = self._gguf.GGMLQuantizationType(place.kind)
        data = np.frombuffer(self._bytes[place.offset : place.offset + place.size], np.uint8)
        row_bytes = place.size // max(1, math.prod(place.shape[:-1]))
        try:
            values = self._gguf.quants.dequantize(data.reshape(-1, row_bytes), kind)
        except (NotImplementedError, ValueError) as error:
            raise self._damaged(f"tensor {name} is {kind.name}: {error}") from None
        return np.asarray(values, np.float32).reshape(place.shape)

    def _damaged(self, what: str) -> GgufError:
        return GgufError(f"{self.path} {what}")

    def _read(self) -> tuple[dict[str, Any], dict[str, _Place]]:
        cursor = _Cursor(self._bytes, min(self._size, _MOST_HEADER_BYTES), self._damaged)
        if cursor.take(4) != _MAGIC:
            raise self._damaged("is not a GGUF file")
        version, tensors, values = cursor.scalar("I"), cursor.scalar("Q"), cursor.scalar("Q")
        if version not in _VERSIONS:
            raise self._damaged(f"is GGUF of version {version}; only 2 and 3, little-endian, are")
        metadata: dict[str, Any] = {}
        for _ in range(values):
            key = cursor.text()
            if key in metadata:
                raise self._damaged(f"has two values of {key!r}")
            metadata[key] = cursor.value(cursor.scalar("I"))
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"has general.alignment={alignment!r}, which is no power of two")
        found = {}
        for _ in range(tensors):
            name = cursor.text()
            if name in found:
                raise self._damaged(f"has two tensors {name!r}")
            axes = cursor.scalar("I")
            if not 1 <= axes <= _MOST_AXES:
                raise self._damaged(f"tensor {name!r} has {axes} axes")
            shape = tuple(cursor.scalar("Q") for _ in range(axes))[::-1]
            found[name] = (shape, cursor.scalar("I"), cursor.scalar("Q"))
        start = -(-cursor.place // alignment) * alignment
        places = {name: self._place(name, start, *entry) for name, entry in found.items()}
        self._check_disjoint(places)
        return metadata, places

    def _place(
        self, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int
    ) -> _Place:
        sizes = {int(known): size for known, size in self._gguf.GGML_QUANT_SIZES.items()}
        if kind not in sizes:
            raise self._damaged(f"tensor {name!r} has the unknown type {kind}; update gguf?")
        block, size = sizes[kind]
        if not math.prod(shape) or shape[-1] % block:
            raise self._damaged(f"tensor {name!r} has shape {shape}, rows in blocks of {block}")
        place = _Place(shape, kind, start + offset, math.prod(shape) // block * size)
        if place.offset + place.size > self._size:
            raise self._damaged(f"ends within tensor {name!r}; is it complete?")
        return place

    def _check_disjoint(self, places: Mapping[str, _Place]) -> None:
        """Tensors that share bytes would take more memory than the file's size explains."""
        ordered = sorted(places.items(), key=lambda item: item[1].offset)
        for (name, place), (other, following) in zip(ordered, ordered[1:], strict=False):
            if place.offset + place.size > following.offset:
                raise self._damaged(f"tensors {name!r} and {other!r} overlap")


class _Cursor:
    """Reads values one after the other and never past the end."""

    def __init__(self, data: mmap.mmap, end: int, error: Any) -> None:
        self._data, self._end, self._error = data, end, error
        self.place = 0

    def take(self, count: int) -> bytes:
        if count > self._end - self.place:
            raise self._error(f"ends within its header, or states a wrong count at {self.place}")
        self.place += count
        return self._data[self.place - count : self.place]

    def scalar(self, form: str) -> int:
        (value,) = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))
        return value

    def text(self) -> str:
        raw = self.take(self.scalar("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self._error(f"has text that is not UTF-8 at {self.place - len(raw)}") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(self.scalar("I"), self.scalar("Q"))
        return self._numbers(kind, 1)[0].item()

    def _array(self, kind: int, count: int) -> Any:
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise self._error(f"has a value of type {kind} at {self.place}, which is not known")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF files need the package gguf: pip install gguf") from None
    return gguf
