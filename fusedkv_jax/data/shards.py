"""Tokenised documents on disk: ArrayRecord shards, an index beside each, and one metadata file.

A folder of shards holds
- `train-00000-of-00004.arrayrecord` and `heldout-00000-of-00001.arrayrecord`: the documents one
  after the other. A document is the ids of BOS, its text and EOS, cut into records of
  `ids_per_record` ids (the last one shorter), so that a piece of a long document can be read
  alone. Ids are little-endian unsigned integers, two bytes each (`dtype` "<u2") for
  vocabularies up to 65536, four ("<u4") above;
- `<shard>.index.npz`: `lengths` (each document's ids less one) and `num_bytes` (UTF-8 bytes of
  each text), int64 in the order of the documents;
- `metadata.json`: format and version, the tokenizer's fingerprint and ids, dtype,
  ids_per_record, held-out fraction, documents, tokens and bytes of each split, the shards and
  the sources.
"""

import array
import dataclasses
import functools
import json
import pathlib
import threading
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fusedkv_jax.data import tokenizers

FORMAT = "fusedkv_jax.tokens"
VERSION = 1
METADATA = "metadata.json"
SPLITS = ("train", "heldout")
UNFINISHED = ".unfinished"
IDS_PER_RECORD = 8192
_SHOWN = 3  # names in a message


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest type of a record that holds all ids of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def shard_name(split: str, index: int, count: int) -> str:
    """Returns the file name of a shard."""
    return f"{split}-{index:05d}-of-{count:05d}.arrayrecord"


def unfinished(path: pathlib.Path) -> pathlib.Path:
    """Returns what a file is called until it is complete, for this writer alone."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{UNFINISHED}")


class ShardWriter:
    """Writes one shard; its file appears when it is closed, and its index, which says so, last."""

    def __init__(self, path: pathlib.Path, dtype: np.dtype) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter  # type: ignore

        self._path, self._dtype = path, dtype
        self._unfinished = unfinished(path)
        # group_size:1 compresses each record by itself, which random access needs.
        self._writer = ArrayRecordWriter(str(self._unfinished), "group_size:1")
        self._lengths = array.array("q")
        self._num_bytes = array.array("q")

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        """Writes one document: its ids with BOS and EOS, and the UTF-8 bytes of its text."""
        for start in range(0, len(ids), IDS_PER_RECORD):
            record = ids[start : start + IDS_PER_RECORD].astype(self._dtype)
            self._writer.write(record.tobytes())
        self._lengths.append(len(ids) - 1)
        self._num_bytes.append(num_bytes)

    def close(self) -> None:
        """Finishes the shard and its index."""
        self._writer.close()
        self._unfinished.replace(self._path)
        index = _index_path(self._path)
        begun = unfinished(index)
        with begun.open("wb") as file:
            np.savez(
                file,
                lengths=np.array(self._lengths, np.int64),
                num_bytes=np.array(self._num_bytes, np.int64),
            )
        begun.replace(index)


def is_whole(path: pathlib.Path) -> bool:
    """Whether a shard has been closed."""
    return _index_path(path).is_file()


def count(paths: Sequence[pathlib.Path]) -> dict[str, int]:
    """Returns documents, tokens to predict (text and EOS) and UTF-8 bytes of shards."""
    totals = {"documents": 0, "tokens": 0, "bytes": 0}
    for path in paths:
        lengths, num_bytes = _read_index(path)
        totals["documents"] += len(lengths)
        totals["tokens"] += int(lengths.sum())
        totals["bytes"] += int(num_bytes.sum())
    return totals


def write_metadata(folder: pathlib.Path, metadata: Mapping[str, object]) -> None:
    """Writes metadata.json, which says that all shards are there."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **metadata}, indent=2)
    begun = unfinished(folder / METADATA)
    begun.write_text(text + "\n", encoding="utf-8")
    begun.replace(folder / METADATA)


def read_metadata(folder: pathlib.Path) -> dict[str, Any]:
    """Reads and checks metadata.json. Raises ValueError if it is missing or not ours."""
    path = folder / METADATA
    if not path.is_file():
        raise ValueError(f"{folder}: shards without {METADATA}; write them with prepare_data")
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        if metadata["format"] != FORMAT or metadata["version"] != VERSION:
            raise ValueError
        known = metadata["dtype"] in ("<u2", "<u4") and all(
            isinstance(entry["file"], str) and entry["split"] in SPLITS
            for entry in metadata["shards"]
        )
        known = known and metadata["ids_per_record"] >= 1
        if not known or not isinstance(metadata["tokenizer"]["fingerprint"], str):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path}: not the metadata of {FORMAT} version {VERSION}") from None
    return metadata


@runtime_checkable
class Records(Protocol):
    """A file of records, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class _Shard:
    path: pathlib.Path
    dtype: np.dtype
    ids_per_record: int
    lengths: np.ndarray
    num_bytes: np.ndarray

    @functools.cached_property
    def first_records(self) -> np.ndarray:
        """The record that each document begins with; at the end, the number of records."""
        counts = -(-(self.lengths + 1) // self.ids_per_record)
        return np.concatenate([[0], np.cumsum(counts)])


class ShardDocuments:
    """The documents of several shards, read when asked for."""

    def __init__(self, files: Sequence[_Shard], vocab_size: int, limit: int | None = None) -> None:
        self._files = files
        self._vocab_size = vocab_size
        self._starts = np.cumsum([0, *(len(file.lengths) for file in files)])
        nothing = np.zeros(0, np.int64)
        self.lengths = np.concatenate([nothing, *(file.lengths for file in files)])[:limit]
        self.num_bytes = np.concatenate([nothing, *(file.num_bytes for file in files)])[:limit]
        self._readers: dict[int, Records] = {}
        self._lock = threading.Lock()

    def read(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns ids `start` to `stop` of a document; see `packing.TokenizedDocuments`.

        Raises:
          ValueError: a damaged record, or token ids outside the vocabulary.
        """
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        row, size = index - int(self._starts[place]), self._files[place].ids_per_record
        stop = int(self.lengths[index]) + 1 if stop is None else stop
        first = start // size
        records = [self._record(place, row, n) for n in range(first, -(-stop // size))]
        return np.concatenate(records)[start - first * size : stop - first * size]

    def _record(self, place: int, row: int, number: int) -> np.ndarray:
        file = self._files[place]
        key = int(file.first_records[row]) + number
        record = self._reader(place)[key]
        size = min(file.ids_per_record, int(file.lengths[row]) + 1 - number * file.ids_per_record)
        if len(record) != size * file.dtype.itemsize:
            raise ValueError(
                f"{file.path}: record {key} does not have the length that the index says; "
                "write the shards again"
            )
        tokens = np.frombuffer(record, file.dtype)
        if int(tokens.max()) >= self._vocab_size:
            raise ValueError(
                f"{file.path}: record {key} has token id {int(tokens.max())}, outside the "
                f"vocabulary of {self._vocab_size}"
            )
        return tokens

    def _reader(self, place: int) -> Records:
        import grain

        # One source per file, so that a message can name the damaged one.
        file = self._files[place]
        with self._lock:
            if place not in self._readers:
                source: Any = grain.sources.ArrayRecordDataSource([str(file.path)])
                if len(source) != file.first_records[-1]:
                    raise ValueError(
                        f"{file.path}: {len(source)} records, but its index has "
                        f"{file.first_records[-1]}; write it again"
                    )
                self._readers[place] = source
            return self._readers[place]


def open_splits(
    files: Sequence[pathlib.Path], tokenizer: tokenizers.Tokenizer, limit: int | None
) -> tuple[ShardDocuments, ShardDocuments]:
    """Opens shards; returns the training and the held-out documents, at most `limit` of each.

    Raises:
      ValueError: other files among them, no metadata or index beside a shard, a shard that the
        metadata do not list, or another tokenizer.
    """
    splits: dict[str, list[_Shard]] = {split: [] for split in SPLITS}
    for path in files:
        metadata = read_metadata(path.parent)
        _check_tokenizer(path.parent, metadata["tokenizer"], tokenizer)
        entries = {entry["file"]: entry["split"] for entry in metadata["shards"]}
        if path.name not in entries:
            raise ValueError(f"{path}: not among the shards that {METADATA} lists")
        lengths, num_bytes = _read_index(path)
        dtype, size = np.dtype(metadata["dtype"]), metadata["ids_per_record"]
        shard = _Shard(path, dtype, size, lengths, num_bytes)
        splits[entries[path.name]].append(shard)
    train, heldout = (ShardDocuments(splits[s], tokenizer.vocab_size, limit) for s in SPLITS)
    return train, heldout


def check_complete(files: Sequence[pathlib.Path]) -> None:
    """Raises ValueError if shards are missing that the metadata beside these files list."""
    for folder in dict.fromkeys(path.parent for path in files):
        names = [entry["file"] for entry in read_metadata(folder)["shards"]]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
            raise ValueError(
                f"{folder}: {len(missing)} of {len(names)} shards that {METADATA} lists are "
                f"missing: {shown}; copy them, or name a glob to read a part"
            )


def _check_tokenizer(folder: pathlib.Path, made: dict, tokenizer: tokenizers.Tokenizer) -> None:
    if made["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(
            f"{folder}: the shards were made with tokenizer {made.get('name')!r} (sha256 "
            f"{made['fingerprint'][:12]}), not with {tokenizer.name!r} (sha256 "
            f"{tokenizer.fingerprint[:12]}); set tokenizer to the first or prepare them again"
        )


def _index_path(shard: pathlib.Path) -> pathlib.Path:
    return shard.with_name(shard.name + ".index.npz")


def _read_index(shard: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    path = _index_path(shard)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as index:
            lengths, num_bytes = index["lengths"], index["num_bytes"]
    except FileNotFoundError:
        raise ValueError(f"{shard}: its index {path.name} is missing; write it again") from None
    except Exception as error:  # Damaged archives raise from zipfile, zlib and numpy alike.
        raise ValueError(f"{path}: damaged index: {error}") from None
    if lengths.shape != num_bytes.shape or lengths.ndim != 1 or (lengths < 1).any():
        raise ValueError(f"{path}: damaged index; write the shards again")
    return lengths, num_bytes
