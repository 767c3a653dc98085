"""Text into shards of tokens, with a report of the progress, for `experiments.prepare_data`."""

import dataclasses
import itertools
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments.common import outputs
from fusedkv_jax.data import corpus, shards, sources, tokenizers
from fusedkv_jax.data.config import check_holdout_fraction
from fusedkv_jax.data.encoding import document_tokens
from fusedkv_jax.training.monitoring.progress import Progress

_SECONDS_PER_LINE = 10.0
_KB = 1000
_MOST_SHARDS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """What to tokenise and where to; the fields are the flags of the same names."""

    input: Sequence[str]
    output_dir: str
    heldout: Sequence[str] = ()
    tokenizer: str = "byte"
    text_key: str = "text"
    num_shards: int = 8
    holdout_fraction: float = 0.01
    max_documents: int | None = None
    max_document_mib: int = 64
    errors: str = "strict"

    def __post_init__(self) -> None:
        if not 1 <= self.num_shards <= _MOST_SHARDS:
            raise ValueError(
                f"num_shards must be from 1 to {_MOST_SHARDS}, got {self.num_shards}; all are open "
                "at once"
            )
        if not 1 <= self.max_document_mib <= 1024:
            raise ValueError(
                f"max_document_mib must be from 1 to 1024, got {self.max_document_mib}"
            )
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"max_documents must be at least 1, got {self.max_documents}")
        check_holdout_fraction(self.holdout_fraction)


def prepare(settings: Preparation) -> dict[str, Any]:
    """Writes the shards and returns their metadata.

    Raises:
      FileNotFoundError: an input or the tokenizer does not exist.
      ValueError: the output folder is not empty, an input cannot be read, or there is no text;
        nothing is written then.
    """
    output = pathlib.Path(settings.output_dir).expanduser().absolute()
    outputs.check_new_folder("output_dir", output, [*settings.input, *settings.heldout])
    files, heldout = (
        sources.list_files(names) if names else [] for names in (settings.input, settings.heldout)
    )
    for file in [*files, *heldout]:
        if sources.is_shard(file):
            raise ValueError(f"{file}: is a shard of tokens already; --input takes text")
    tokenizer = tokenizers.load(settings.tokenizer)
    with outputs.complete_folder("output_dir", output) as work:
        return _write(settings, files, heldout, tokenizer, work)


def _write(
    settings: Preparation,
    files: Sequence[pathlib.Path],
    heldout: Sequence[pathlib.Path],
    tokenizer: tokenizers.Tokenizer,
    folder: pathlib.Path,
) -> dict[str, Any]:
    dtype = shards.token_dtype(tokenizer.vocab_size)
    writers = {
        False: shards.ShardWriter(folder, "train", settings.num_shards, dtype),
        True: shards.ShardWriter(folder, "heldout", 1, dtype),
    }
    options: dict[str, Any] = {
        "text_key": settings.text_key,
        "errors": settings.errors,
        "max_bytes": settings.max_document_mib * 2**20,
    }
    documents = sources.read_all(files, **options)
    documents = itertools.islice(documents, settings.max_documents)
    with _Report(sum(file.stat().st_size for file in files)) as report:
        for document, ids in corpus.tokenized(documents, tokenizer):
            text = document.text.encode()
            is_heldout = corpus.is_held_out(text, settings.holdout_fraction)
            writers[is_heldout].add(document_tokens(ids, tokenizer), len(text))
            report.update(document.bytes_read, len(ids))
    for document, ids in corpus.tokenized(sources.read_all(heldout, **options), tokenizer):
        writers[True].add(document_tokens(ids, tokenizer), len(document.text.encode()))
    entries = [entry for writer in writers.values() for entry in writer.close()]
    if not report.documents:
        raise ValueError(f"no text in {len(files)} file(s) of {', '.join(settings.input)}")
    metadata = {
        "tokenizer": _describe(tokenizer),
        "dtype": dtype.str,
        "ids_per_record": shards.IDS_PER_RECORD,
        "holdout_fraction": settings.holdout_fraction,
        "train": writers[False].counts(),
        "heldout": writers[True].counts(),
        "shards": entries,
        "sources": [
            {"file": file.name, "size": file.stat().st_size} for file in [*files, *heldout]
        ],
    }
    shards.write_metadata(folder, metadata)
    return metadata


def advice(settings: Preparation, metadata: dict[str, Any]) -> str:
    """What to add to a training command to use the shards, and what they cannot be used for."""
    if not metadata["train"]["documents"]:
        return "every document is held out, so they are for evaluation only"
    options = [f"--config.data.source={settings.output_dir}"]
    if settings.tokenizer != "byte":
        options += [
            f"--config.data.tokenizer={settings.tokenizer}",
            f"--config.model.vocab_size={metadata['tokenizer']['vocab_size']}",
        ]
    text = f"train with {shlex.join(options)}"
    if metadata["heldout"]["documents"]:
        return text
    return (
        f"{text} --config.train.eval_batches=0, because no document is held out: to evaluate, "
        "prepare them again with more documents or a larger --holdout_fraction than "
        f"{settings.holdout_fraction:g}"
    )


def _describe(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    return {
        "name": pathlib.Path(tokenizer.name).name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }


class _Report:
    """The progress bar over the bytes of all inputs, or a line every ten seconds."""

    def __init__(self, total_bytes: int) -> None:
        self.documents = self.tokens = 0
        self._progress = Progress(-(-total_bytes // _KB), label="tokenising", unit="kB")
        self._start = self._last = time.monotonic()

    def __enter__(self) -> "_Report":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.__exit__(*exc_info)

    def update(self, bytes_read: int, tokens: int) -> None:
        """Counts a document of so many tokens; the readers have got to `bytes_read`."""
        self.documents += 1
        self.tokens += tokens
        self._progress.advance(bytes_read // _KB - self._progress.done)
        now = time.monotonic()
        if now - self._last >= _SECONDS_PER_LINE:
            self._last = now
            if not sys.stderr.isatty():
                self._progress.print(self._line(now - self._start))

    def _line(self, seconds: float) -> str:
        return (
            f"{self.documents} documents, {self._progress.done} of {self._progress.total} kB, "
            f"{self.tokens / seconds:.0f} tokens/s, {self._progress.time_left()} left"
        )
