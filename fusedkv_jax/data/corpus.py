"""The corpus: a source read, tokenised and divided into training and held-out documents."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from fusedkv_jax.data import formats, shards, sources, tokenizers
from fusedkv_jax.data.config import DataConfig
from fusedkv_jax.data.encoding import document_tokens
from fusedkv_jax.data.packing import TokenizedDocuments
from fusedkv_jax.data.recall import RECALL, RecallSequences

_TEXTS_PER_CALL = 256  # Enough to keep the tokenizer's threads busy.


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
    """Tokenised documents held in memory, in the smallest unsigned type that fits."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._dtype = shards.token_dtype(tokenizer.vocab_size)
        self._tokens: list[np.ndarray] = []
        self._num_bytes: list[int] = []

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        """Adds one document, given its ids without BOS and EOS and its size in UTF-8 bytes."""
        self._tokens.append(document_tokens(ids, self._tokenizer).astype(self._dtype))
        self._num_bytes.append(num_bytes)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(tokens) - 1 for tokens in self._tokens], np.int64)

    @property
    def num_bytes(self) -> np.ndarray:
        return np.array(self._num_bytes, np.int64)

    def read(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._tokens[index][start:stop]


def load_corpus(config: DataConfig) -> Corpus:
    """Reads the source of `config`: text is tokenised into memory, shards are opened.

    Raises:
      FileNotFoundError: source or tokenizer do not exist.
      ValueError: nothing to read, a file that cannot be read, or shards made with another
        tokenizer; the message names the file.
    """
    tokenizer = tokenizers.load(config.tokenizer)
    if config.source == RECALL:
        sizes = {"vocab_size": tokenizer.vocab_size, "seq_len": config.seq_len}
        train, heldout = (
            RecallSequences(split, **sizes, seed=config.seed) for split in ("train", "heldout")
        )
        return Corpus(train, heldout, tokenizer)
    files = sources.list_files([config.source])
    if any(sources.is_shard(file) for file in files):
        train, heldout = shards.open_splits(files, tokenizer, config.max_documents)
        return Corpus(train, heldout, tokenizer)
    documents = sources.read_all(files, text_key=config.text_key, errors=config.errors)
    splits = {False: InMemoryDocuments(tokenizer), True: InMemoryDocuments(tokenizer)}
    empty = True
    for document, ids in tokenized(itertools.islice(documents, config.max_documents), tokenizer):
        data = document.text.encode()
        splits[is_held_out(data, config.holdout_fraction)].add(ids, len(data))
        empty = False
    if empty:
        raise ValueError(f"{config.source}: no text in {len(files)} file(s)")
    return Corpus(splits[False], splits[True], tokenizer)


def tokenized(
    documents: Iterable[formats.Document], tokenizer: tokenizers.Tokenizer
) -> Iterable[tuple[formats.Document, np.ndarray]]:
    """Yields each document with its ids (no BOS, no EOS), tokenised in groups."""
    iterator = iter(documents)
    while group := list(itertools.islice(iterator, _TEXTS_PER_CALL)):
        yield from zip(group, _encode(group, tokenizer), strict=True)


def _encode(
    group: Sequence[formats.Document], tokenizer: tokenizers.Tokenizer
) -> Iterable[np.ndarray]:
    return tokenizer.encode_batch([document.text for document in group])


def is_held_out(text: bytes, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: a function of its bytes alone."""
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
