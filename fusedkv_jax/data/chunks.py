"""Tokenized chunks of text, on disk, and the shards that are put together from them.

A preparation first turns text into chunks, by any number of workers in any order, and then chunks
into shards. A file of either kind appears under its name when it is complete, and depends on the
text and the `Recipe` alone, so that a preparation can stop at any moment and go on.

Training documents go to the shards in turn. Where a chunk's first one goes is known when all
chunks before it are there, so a chunk keeps its documents by lanes: lane j has every num_shards-th
training document, from the j-th of the chunk on, and the lane after the last the held-out ones. A
shard is one lane of each chunk. In a file of safetensors:
- `ids`: the documents of all lanes end to end, each from BOS to EOS, in the dtype of shards;
- `lengths` and `num_bytes`, int64: ids, and UTF-8 bytes of text, of each document;
- `lanes`, int64 [num_shards + 2]: where each lane's documents begin in these, and the end.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fusedkv_jax.data import corpus, formats, shards, sources, tokenizers
from fusedkv_jax.data.encoding import document_tokens

# What a worker holds at a time, and what an interruption costs it.
CHARACTERS_PER_CHUNK, DOCUMENTS_PER_CHUNK = 2**24, 2**16
# Small files are read together: what is done is kept book of by unit.
BYTES_PER_UNIT = 2**26


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How text becomes tokens; `DataConfig` has the fields of the same names."""

    tokenizer: str
    text_key: str
    errors: str
    max_bytes: int
    holdout_fraction: float
    num_shards: int


@dataclasses.dataclass(frozen=True)
class Unit:
    """Consecutive files, which one reader reads.

    Attributes:
      number: its place in the order of the documents.
      files: its files.
      heldout: whether all its documents are held out.
    """

    number: int
    files: tuple[pathlib.Path, ...]
    heldout: bool


@dataclasses.dataclass(frozen=True)
class TextChunk:
    """Consecutive documents of a unit.

    Attributes:
      unit: the unit.
      number: its place in the unit.
      texts: of each document; there may be none.
      bytes_read: how far into the unit's files (bytes on disk) the reader is.
      last: whether no other follows in the unit.
    """

    unit: Unit
    number: int
    texts: list[str]
    bytes_read: int
    last: bool


def units(files: Sequence[pathlib.Path], *, heldout: bool = False, first: int = 0) -> list[Unit]:
    """Divides files into units, numbered from `first` on."""
    groups: list[list[pathlib.Path]] = []
    room = -1
    for file in files:
        size = file.stat().st_size
        if size > room:
            groups.append([])
            room = BYTES_PER_UNIT
        groups[-1].append(file)
        room -= size
    return [Unit(first + i, tuple(group), heldout) for i, group in enumerate(groups)]


def read(unit: Unit, recipe: Recipe, max_documents: int | None = None) -> Iterator[TextChunk]:
    """Yields the chunks of a unit, at least one. Raises as `formats.read_documents`."""
    documents = sources.read_all(
        unit.files, text_key=recipe.text_key, errors=recipe.errors, max_bytes=recipe.max_bytes
    )
    texts: list[str] = []
    number = characters = total = bytes_read = 0
    for document in documents:
        if total == max_documents:
            break
        if len(texts) == DOCUMENTS_PER_CHUNK or characters >= CHARACTERS_PER_CHUNK:
            yield TextChunk(unit, number, texts, bytes_read, last=False)
            texts, number, characters = [], number + 1, 0
        texts.append(document.text)
        characters += len(document.text)
        bytes_read = document.bytes_read
        total += 1
    yield TextChunk(unit, number, texts, bytes_read, last=True)


def chunk_path(folder: pathlib.Path, unit: int, number: int) -> pathlib.Path:
    """The file of a chunk."""
    return folder / f"{unit:06d}-{number:06d}.safetensors"


def write(
    folder: pathlib.Path, chunk: TextChunk, recipe: Recipe, tokenizer: tokenizers.Tokenizer
) -> int:
    """Tokenizes a chunk into its file; returns the number of ids in it."""
    from safetensors.numpy import save

    content = _content(chunk, recipe, tokenizer)
    path = chunk_path(folder, chunk.unit.number, chunk.number)
    begun = shards.unfinished(path)
    begun.write_bytes(save(content))
    begun.replace(path)
    return content["ids"].size


def _content(
    chunk: TextChunk, recipe: Recipe, tokenizer: tokenizers.Tokenizer
) -> dict[str, np.ndarray]:
    dtype, count = shards.token_dtype(tokenizer.vocab_size), recipe.num_shards
    documents = (formats.Document(text, "", 0) for text in chunk.texts)
    lanes: list[list[tuple[np.ndarray, int]]] = [[] for _ in range(count + 1)]
    train = 0
    for document, ids in corpus.tokenized(documents, tokenizer):
        data = document.text.encode()
        entry = document_tokens(ids, tokenizer).astype(dtype), len(data)
        if chunk.unit.heldout or corpus.is_held_out(data, recipe.holdout_fraction):
            lanes[count].append(entry)
        else:
            lanes[train % count].append(entry)
            train += 1
    entries = [entry for lane in lanes for entry in lane]
    return {
        "ids": np.concatenate([np.zeros(0, dtype), *(ids for ids, _ in entries)]),
        "lengths": np.array([len(ids) for ids, _ in entries], np.int64),
        "num_bytes": np.array([size for _, size in entries], np.int64),
        "lanes": np.cumsum([0, *map(len, lanes)], dtype=np.int64),
    }


def write_shard(
    path: pathlib.Path, chunks: Iterable[pathlib.Path], index: int | None, dtype: np.dtype
) -> None:
    """Puts a shard together.

    Args:
      path: the shard.
      chunks: all chunks in the order of the documents.
      index: of a training shard; None is the held-out one.
      dtype: of its ids.

    Raises:
      ValueError: a damaged chunk.
    """
    writer = shards.ShardWriter(path, dtype)
    train = 0
    for chunk in chunks:
        with _open(chunk) as file:
            lanes = file.get_tensor("lanes")
            count = len(lanes) - 2
            lane = count if index is None else (index - train) % count
            for ids, num_bytes in _documents(file, int(lanes[lane]), int(lanes[lane + 1])):
                writer.add(ids, num_bytes)
            train += int(lanes[count])
    writer.close()


def _documents(file, start: int, stop: int) -> Iterator[tuple[np.ndarray, int]]:
    """Documents `start` to `stop` of an open chunk, as ids and bytes."""
    if start == stop:
        return
    lengths, num_bytes = file.get_tensor("lengths"), file.get_tensor("num_bytes")
    ends = np.cumsum(lengths)
    first = int(ends[start] - lengths[start])
    ids = file.get_slice("ids")[first : int(ends[stop - 1])]
    for row in range(start, stop):
        end = int(ends[row]) - first
        yield ids[end - int(lengths[row]) : end], int(num_bytes[row])


def _open(path: pathlib.Path):
    import safetensors

    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged: {error}; prepare the text again") from None
