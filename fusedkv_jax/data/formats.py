"""Readers: one function per file format, each yielding the documents of a file in order."""

import codecs
import contextlib
import dataclasses
import gzip
import io
import json
import lzma
import pathlib
import zlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

COMPRESSIONS = (".gz", ".xz", ".zst")
TEXT_SUFFIXES = (".txt", ".md", ".py")
JSON_SUFFIXES = (".jsonl", ".json")
PARQUET_SUFFIXES = (".parquet",)
# A small file can hold a large text: what is read at a time has a bound, whatever the input.
MAX_DOCUMENT_BYTES = 64 * 2**20
_ROWS_PER_BATCH = 64  # of Parquet


@dataclasses.dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
      text: its text, encodable as UTF-8.
      where: "file" or "file:line", for messages.
      bytes_read: how far into the file (bytes on disk) the reader is, for progress bars.
    """

    text: str
    where: str
    bytes_read: int


def format_of(path: pathlib.Path) -> str | None:
    """Returns "text", "json" or "parquet" for a file name that can be read, else None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    last = (suffixes[:-1] if compressed else suffixes)[-1:]
    if last and last[0] in TEXT_SUFFIXES:
        return "text"
    if last and last[0] in JSON_SUFFIXES:
        return "json"
    return "parquet" if last and last[0] in PARQUET_SUFFIXES and not compressed else None


def read_documents(
    path: pathlib.Path,
    *,
    text_key: str = "text",
    errors: str = "strict",
    max_bytes: int = MAX_DOCUMENT_BYTES,
) -> Iterator[Document]:
    """Yields the documents of one file; a text file is one, a JSON line or Parquet row is one.

    The file is read as a stream; a document or line of more than `max_bytes` is never held whole.

    Raises:
      ValueError: a document that is too large, bytes that are not UTF-8 (with errors="strict"; the
        message gives the offset in the decompressed file), a line that is not a JSON object, a
        missing text field, or a damaged file. FileNotFoundError: there is no such file.
    """
    readers = {"text": _read_text, "json": _read_json_lines, "parquet": _read_parquet}
    kind = format_of(path)
    if kind is None:
        known = ", ".join((*TEXT_SUFFIXES, *JSON_SUFFIXES, *PARQUET_SUFFIXES))
        raise ValueError(
            f"{path}: unknown file type {path.suffix!r}; known are {known} "
            f"(text and JSON lines also with {', '.join(COMPRESSIONS)})"
        )
    yield from readers[kind](path, _Reading(text_key, errors, max_bytes))


@dataclasses.dataclass(frozen=True)
class _Reading:
    """How to read: the field that holds the text, what to do with bad bytes, and how much."""

    text_key: str
    errors: str
    max_bytes: int

    def check_size(self, size: int, where: str) -> None:
        if size > self.max_bytes:
            raise ValueError(
                f"{where}: a document of more than {self.max_bytes / 2**20:g} MiB; divide the text "
                "into documents (JSON lines, or several files), or raise max_document_mib"
            )


def _read_text(path: pathlib.Path, how: _Reading) -> Iterator[Document]:
    with _open(path) as (stream, raw), _damage_as_value_error(path):
        content = stream.read(how.max_bytes + 1)
        how.check_size(len(content), str(path))
        yield Document(_decode(content, str(path), 0, how.errors), str(path), raw.tell())


def _read_json_lines(path: pathlib.Path, how: _Reading) -> Iterator[Document]:
    offset = number = 0
    with _open(path) as (stream, raw), _damage_as_value_error(path):
        while line := stream.readline(how.max_bytes + 1):
            number += 1
            where = f"{path}:{number}"
            how.check_size(len(line), where)
            text = _decode(line, where, offset, how.errors).strip()
            offset += len(line)
            if text:
                yield Document(_json_text(text, where, how), where, raw.tell())


def _json_text(line: str, where: str, how: _Reading) -> str:
    text_key = how.text_key
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError(f"{where}: not a line of JSON that can be read: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where}: not a line of JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON line must be an object, got {type(record).__name__}")
    if text_key not in record:
        raise ValueError(
            f"{where}: no field {text_key!r} (there are: {', '.join(sorted(record))}); "
            "set text_key to the one that holds the text"
        )
    return _check_text(record[text_key], where, how)


def _read_parquet(path: pathlib.Path, how: _Reading) -> Iterator[Document]:
    pyarrow, text_key = _pyarrow("Parquet files"), how.text_key
    size = path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                raise ValueError(
                    f"{path}: no column {text_key!r} (there are: {', '.join(names)}); "
                    "set text_key to the one that holds the text"
                )
            row = 0
            for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=[text_key]):
                for value in batch.column(0):
                    row += 1
                    where = f"{path}:{row}"
                    text = _check_text(value.as_py(), where, how)
                    yield Document(text, where, size * row // file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {_one_line(error)}") from None


def _check_text(value: object, where: str, how: _Reading) -> str:
    text_key = how.text_key
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise ValueError(f"{where}: {text_key!r} must be a string, got {kind}")
    try:
        how.check_size(len(value.encode()), where)
    except UnicodeEncodeError as error:  # A lone surrogate written as an escape.
        if how.errors == "strict":
            raise ValueError(
                f"{where}: {text_key!r} has an unpaired surrogate at character {error.start}; "
                "repair the file or set errors='replace'"
            ) from None
        return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return value


def _decode(data: bytes, where: str, offset: int, errors: str) -> str:
    """Decodes UTF-8; `offset` is where `data` begins in its file. A leading BOM is dropped."""
    if offset == 0 and data.startswith(codecs.BOM_UTF8):
        offset = len(codecs.BOM_UTF8)
        data = data[offset:]
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8; "
            "repair the file or set errors='replace'"
        ) from None


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[tuple[io.BufferedIOBase, io.BufferedReader]]:
    """Yields the decompressed stream of a file, and the file on disk below it."""
    opener = _OPENERS.get(path.suffix.lower())
    try:
        raw = path.open("rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {str(path)!r}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror}") from None
    with raw:
        if opener is None:
            yield raw, raw
        else:
            with opener(raw) as stream:
                yield stream, raw


def _open_gzip(raw: io.BufferedReader) -> io.BufferedIOBase:
    return gzip.GzipFile(fileobj=raw, mode="rb")


def _open_xz(raw: io.BufferedReader) -> io.BufferedIOBase:
    return lzma.LZMAFile(raw, "rb")


def _open_zstd(raw: io.BufferedReader) -> io.BufferedIOBase:
    # Not the zstandard package: its readers take a truncated file for a short one.
    pyarrow = _pyarrow(".zst files")
    stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return io.BufferedReader(stream)


def _pyarrow(needed_for: str) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{needed_for} need pyarrow; pip install pyarrow") from None
    return pyarrow


_OPENERS = {".gz": _open_gzip, ".xz": _open_xz, ".zst": _open_zstd}


@contextlib.contextmanager
def _damage_as_value_error(path: pathlib.Path) -> Iterator[None]:
    """Turns what decompressors raise on damaged files into one line that names the file."""
    try:
        yield
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
