"""The corpus: a source read, tokenised and divided into training and held-out documents."""

import array
import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

from fusedkv_jax.data import formats, shards, sources, tokenizers
from fusedkv_jax.data.config import DataConfig
from fusedkv_jax.data.encoding import document_tokens
from fusedkv_jax.data.mixture import JoinedDocuments, Mixture
from fusedkv_jax.data.packing import TokenizedDocuments
from fusedkv_jax.data.recall import RecallSequences
from fusedkv_jax.validation import check_kind

# Enough to keep the tokenizer's threads busy, and no more than fits beside one large text.
_TEXTS_PER_CALL, _CHARACTERS_PER_CALL = 256, 2**22
MAX_BYTES_IN_MEMORY = 4 * 2**30


class EmptySplitError(ValueError):
    """The training or the held-out split has no documents."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Both splits of a source, and the tokenizer that made them.

    Either split may be empty (length 0); who needs it says so with EmptySplitError. The splits of
    the source "recall" are sequences already.
    """

    train: TokenizedDocuments | RecallSequences
    heldout: TokenizedDocuments | RecallSequences
    tokenizer: tokenizers.Tokenizer


class InMemoryDocuments:
    """Tokenised documents held in memory, end to end in the smallest unsigned type that fits."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._dtype = shards.token_dtype(tokenizer.vocab_size)
        self._ids = bytearray()
        self._starts = array.array("q", [0])  # in ids, with the end of the last document
        self._num_bytes = array.array("q")

    @property
    def nbytes(self) -> int:
        """Size in memory, in bytes."""
        return len(self._ids) + 8 * (len(self._starts) + len(self._num_bytes))

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        """Adds one document, given its ids without BOS and EOS and its size in UTF-8 bytes."""
        self._ids += document_tokens(ids, self._tokenizer).astype(self._dtype).tobytes()
        self._starts.append(len(self._ids) // self._dtype.itemsize)
        self._num_bytes.append(num_bytes)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(np.array(self._starts, np.int64)) - 1

    @property
    def num_bytes(self) -> np.ndarray:
        return np.array(self._num_bytes, np.int64)

    def read(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        first, end = self._starts[index], self._starts[index + 1]
        size = self._dtype.itemsize
        document = np.frombuffer(self._ids, self._dtype, end - first, first * size)
        return document[start:stop]


def load_corpus(config: DataConfig) -> Corpus:
    """Reads the source of `config`: text is tokenised into memory, shards are opened.

    Raises:
      FileNotFoundError: source or tokenizer do not exist.
      ValueError: nothing to read, a file that cannot be read, a folder without some of its
        shards, or shards made with another tokenizer; the message names the file.
    """
    check_kind("config", config, DataConfig, "a DataConfig")
    tokenizer = tokenizers.load(config.tokenizer)
    mixed = sources.mixture(config.source)
    if len(mixed) == 1:
        return _load(config, tokenizer)
    names, weights = zip(*mixed, strict=True)
    parts: list[Corpus] = []
    for name in names:
        parts.append(_load(dataclasses.replace(config, source=name), tokenizer))
        _check_memory(config.source, (d for part in parts for d in (part.train, part.heldout)))
    train, heldout = ([getattr(part, split) for part in parts] for split in shards.SPLITS)
    return Corpus(Mixture(names, train, weights), JoinedDocuments(names, heldout), tokenizer)


def _load(config: DataConfig, tokenizer: tokenizers.Tokenizer) -> Corpus:
    if config.source == sources.RECALL:
        sizes = {"vocab_size": tokenizer.vocab_size, "seq_len": config.seq_len}
        train, heldout = (
            RecallSequences(split, **sizes, seed=config.seed) for split in ("train", "heldout")
        )
        return Corpus(train, heldout, tokenizer)
    files = sources.list_files([config.source])
    if any(sources.is_shard(file) for file in files):
        # An incomplete copy must not pass for the corpus; a glob or a file may name a part of it.
        if pathlib.Path(config.source).expanduser().is_dir():
            shards.check_complete(files)
        train, heldout = shards.open_splits(files, tokenizer, config.max_documents)
        return Corpus(train, heldout, tokenizer)
    documents = sources.read_all(
        files,
        text_key=config.text_key,
        errors=config.errors,
        max_bytes=config.max_document_mib * 2**20,
    )
    splits = {False: InMemoryDocuments(tokenizer), True: InMemoryDocuments(tokenizer)}
    empty = True
    for document, ids in tokenized(itertools.islice(documents, config.max_documents), tokenizer):
        data = document.text.encode()
        splits[is_held_out(data, config.holdout_fraction)].add(ids, len(data))
        _check_memory(config.source, splits.values())
        empty = False
    if empty:
        raise ValueError(f"{config.source}: no text in {len(files)} file(s)")
    return Corpus(splits[False], splits[True], tokenizer)


def _check_memory(source: str, documents: Iterable[object]) -> None:
    held = (part.nbytes for part in documents if isinstance(part, InMemoryDocuments))
    if sum(held) > MAX_BYTES_IN_MEMORY:
        raise ValueError(
            f"{source}: more than {MAX_BYTES_IN_MEMORY / 2**30:g} GiB of tokens; write "
            "shards with experiments.prepare_data, which need no memory, or set "
            "data.max_documents"
        )


def tokenized(
    documents: Iterable[formats.Document], tokenizer: tokenizers.Tokenizer
) -> Iterable[tuple[formats.Document, np.ndarray]]:
    """Yields each document with its ids (no BOS, no EOS), tokenised in groups."""
    for group in _groups(documents):
        yield from zip(group, tokenizer.encode_batch([d.text for d in group]), strict=True)


def _groups(documents: Iterable[formats.Document]) -> Iterator[list[formats.Document]]:
    group, characters = [], 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if len(group) == _TEXTS_PER_CALL or characters >= _CHARACTERS_PER_CALL:
            yield group
            group, characters = [], 0
    if group:
        yield group


def is_held_out(text: bytes, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: a function of its bytes alone."""
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
