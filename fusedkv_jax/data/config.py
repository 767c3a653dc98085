"""The frozen settings of a data pipeline, validated when they are built."""

import dataclasses
from typing import Literal

from fusedkv_jax.data import sources
from fusedkv_jax.validation import validate

Packing = Literal["concat", "best_fit"]
DecodeErrors = Literal["strict", "replace"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to read, how to tokenise it and how to lay it out in batches.

    Attributes:
      source: "python_stdlib" (the .py files of the running interpreter's standard library
        without its tests), "recall" (synthetic tasks over the ids of the tokenizer, written as
        they are read; only answers are targets), or a file, a glob or a folder of text (.txt,
        .md, .py), JSON lines (.jsonl, .json), both also compressed (.gz, .xz, .zst), Parquet
        (.parquet), or the ArrayRecord shards that `experiments.prepare_data` wrote. Folders are
        read recursively in the order of their sorted relative paths. A text file is one document.
        Several of these, "web,0.7;code,0.3", are mixed: each has the share of the training
        sequences that its weight says and is repeated by itself, and the held-out documents
        of all are evaluated.
      text_key: the field of a JSON line, or the column of a Parquet file, that holds the text.
      tokenizer: "byte", or the path of a Hugging Face `tokenizer.json`.
      packing: "concat" (no padding but in the last sequence of an epoch) or "best_fit"
        (documents that fit into a sequence are never split). `packing.py` has the details.
      seq_len: tokens of a sequence, T.
      batch_size: sequences of a batch over all processes, B.
      seed: the order of the training sequences; evaluation does not depend on it.
      holdout_fraction: expected share of the documents that are held out, chosen by a hash of
        each document's text, so equal documents stay together and new files move no old ones.
        1.0 makes a whole source an evaluation set. Shards keep the split they were written
        with.
      max_documents: read only the first so many documents (of each source, and of each split for
        shards).
      max_document_mib: the largest document, in MiB of text; larger ones are refused.
      errors: "strict" refuses bytes that are not UTF-8, "replace" puts U+FFFD in their place.
      num_threads: threads that assemble batches ahead of the consumer; 0 does so in its thread.
      prefetch_batches: how many batches they may be ahead.
    """

    source: str = "python_stdlib"
    text_key: str = "text"
    tokenizer: str = "byte"
    packing: Packing = "concat"
    seq_len: int
    batch_size: int
    seed: int = 0
    holdout_fraction: float = 0.01
    max_documents: int | None = None
    max_document_mib: int = 64
    errors: DecodeErrors = "strict"
    num_threads: int = 2
    prefetch_batches: int = 8

    def __post_init__(self) -> None:
        validate(self, ValueError, least=_LEAST, most=_MOST, prefix="data.")
        for name in ("source", "text_key", "tokenizer"):
            if not getattr(self, name):
                raise ValueError(f"data.{name}='' is empty; give a name")
        sources.mixture(self.source)
        if self.batch_size * self.seq_len >= 2**31:
            raise ValueError(
                f"data.batch_size={self.batch_size} x data.seq_len={self.seq_len} is "
                f"{self.batch_size * self.seq_len:,} tokens a batch, of 2**31 - 1 at most; lower "
                "one of them"
            )


_LEAST = {
    "seq_len": 1,
    "batch_size": 1,
    "seed": 0,
    "holdout_fraction": 0,
    "max_documents": 1,
    "max_document_mib": 1,
    "num_threads": 0,
    "prefetch_batches": 1,
}
_MOST = {
    "seed": 2**32 - 1,
    "holdout_fraction": 1,
    "max_document_mib": 1024,
    "num_threads": 1024,
    "prefetch_batches": 4096,
}
