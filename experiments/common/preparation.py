"""Text into shards of tokens, by any number of workers, for `experiments.prepare_data`.

Text becomes chunks of tokens first, and chunks become shards (`fusedkv_jax.data.chunks`), in a
hidden folder beside the output. It gets the name of the output when the last shard is complete;
after an interruption the same preparation goes on there.
"""

import dataclasses
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments.common import outputs
from experiments.common.documents import Document
from experiments.common.preparation_workers import Done, PreparationJob, Processes
from fusedkv_jax.data import chunks, shards, sources, tokenizers
from fusedkv_jax.training.monitoring.progress import Progress
from fusedkv_jax.validation import validate

_SECONDS_PER_LINE = 10.0
_KB = 1000
_SHOWN = 3  # names in a message
_MOST = {"num_shards": 1024, "max_document_mib": 1024, "workers": 1024, "holdout_fraction": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """What to tokenise, where to and by whom; the fields are the flags of the same names."""

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
    workers: int = 1
    ray: str | None = None

    def __post_init__(self) -> None:
        least = dict.fromkeys(("num_shards", "max_documents", "max_document_mib", "workers"), 1)
        validate(self, ValueError, least=least | {"holdout_fraction": 0}, most=_MOST)
        if self.max_documents and self.ray:
            raise ValueError(
                f"max_documents={self.max_documents} counts documents in order, and on Ray files "
                "are read at once; leave --ray out, or name fewer files"
            )


def prepare(settings: Preparation) -> Document:
    """Writes the shards and returns their metadata.

    What is written does not depend on the workers, nor on interruptions. Files of the input that
    are held out by name are not trained on, which is printed.

    Raises:
      FileNotFoundError: an input or the tokenizer does not exist.
      ValueError: the output folder is not empty, an input cannot be read, or there is no text, or
        none that is not held out by name; nothing is left then. Or what was begun for this output
        was another preparation, or is still going on; that stays as it is.
      ChildProcessError: a worker died; the same preparation goes on.
    """
    output = pathlib.Path(settings.output_dir).expanduser().absolute()
    outputs.check_new_folder("output_dir", output, [*settings.input, *settings.heldout])
    files, heldout = (
        [file.absolute() for file in sources.list_files(names)] if names else []
        for names in (settings.input, settings.heldout)
    )
    for file in [*files, *heldout]:
        if sources.is_shard(file):
            raise ValueError(f"{file}: is a shard of tokens already; --input takes text")
    files = _without(files, heldout)
    tokenizer = tokenizers.load(settings.tokenizer)
    recipe = chunks.Recipe(
        tokenizer=_absolute(settings.tokenizer),
        text_key=settings.text_key,
        errors=settings.errors,
        max_bytes=settings.max_document_mib * 2**20,
        holdout_fraction=settings.holdout_fraction,
        num_shards=settings.num_shards,
    )
    plan = {
        "settings": dataclasses.asdict(recipe) | {"tokenizer": tokenizer.fingerprint},
        "max_documents": settings.max_documents,
        "input": [_identity(file) for file in files],
        "heldout": [_identity(file) for file in heldout],
    }
    with (
        _workers(settings) as workers,
        outputs.resumable_folder("output_dir", output, plan) as (scratch, made),
    ):
        if not (made / shards.METADATA).is_file():
            job = PreparationJob(
                scratch, made, recipe, shards.token_dtype(tokenizer.vocab_size).str
            )
            _write(settings, job, workers, tokenizer, files, heldout)
        return shards.read_metadata(made)


def _without(files: list[pathlib.Path], heldout: list[pathlib.Path]) -> list[pathlib.Path]:
    """The files to train on, after a line about those that are held out."""
    left = {file.resolve(): file for file in files}
    both = [left.pop(file) for file in (each.resolve() for each in heldout) if file in left]
    if both and not left:
        raise ValueError(
            "nothing to train on: --heldout names every file of --input; name others in one of them"
        )
    if both:
        names = ", ".join(map(str, both[:_SHOWN])) + (", ..." if len(both) > _SHOWN else "")
        print(f"{len(both)} file(s) of --input are held out, not trained on: {names}")
    return list(left.values())


def _absolute(tokenizer: str) -> str:
    return (
        tokenizer if tokenizer == "byte" else str(pathlib.Path(tokenizer).expanduser().absolute())
    )


def _identity(file: pathlib.Path) -> list[Any]:
    status = file.stat()
    return [str(file.absolute()), status.st_size, status.st_mtime_ns]


def _write(
    settings: Preparation,
    job: PreparationJob,
    workers: Any,
    tokenizer: tokenizers.Tokenizer,
    files: Sequence[pathlib.Path],
    heldout: Sequence[pathlib.Path],
) -> None:
    units = chunks.units(files)
    units += chunks.units(heldout, heldout=True, first=len(units))
    places = job.places()
    with _Report(job, units) as report:
        for done in workers.tokenize(job, units, settings.max_documents):
            report.update(done)
        if not any(job.documents(unit) for unit in units if not unit.heldout):
            names = ", ".join(settings.input)
            raise ValueError(f"no text in {len(files)} file(s) of {names}")
        workers.assemble(job, [place for place in places if not shards.is_whole(place.path)])
    splits = {split: [p.path for p in places if p.split == split] for split in shards.SPLITS}
    metadata = {
        "tokenizer": _describe(tokenizer),
        "dtype": job.dtype,
        "ids_per_record": shards.IDS_PER_RECORD,
        "holdout_fraction": settings.holdout_fraction,
        **{split: shards.count(paths) for split, paths in splits.items()},
        "shards": [
            {
                "file": place.path.name,
                "split": place.split,
                "documents": shards.count([place.path])["documents"],
            }
            for place in places
        ],
        "sources": [
            {"file": file.name, "size": file.stat().st_size} for file in [*files, *heldout]
        ],
    }
    for begun in job.made.glob(f"*{shards.UNFINISHED}"):  # by who was killed
        begun.unlink()
    shards.write_metadata(job.made, metadata)


def _workers(settings: Preparation) -> Any:
    if settings.ray is None:
        return Processes(settings.workers)
    from experiments.common.preparation_ray import Ray

    return Ray(settings.ray)


def advice(settings: Preparation, metadata: Document) -> str:
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


def _describe(tokenizer: tokenizers.Tokenizer) -> Document:
    return {
        "name": pathlib.Path(tokenizer.name).name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }


class _Report:
    """The progress bar over the bytes of all files, or a line every ten seconds."""

    def __init__(self, job: PreparationJob, units: Sequence[chunks.Unit]) -> None:
        self._sizes = {u.number: sum(file.stat().st_size for file in u.files) for u in units}
        complete = [unit.number for unit in units if job.documents(unit) is not None]
        # Bytes of units that are complete, and of those that are not.
        self._complete = sum(self._sizes[number] for number in complete)
        self._begun: dict[int, int] = {}
        self.documents = self.tokens = 0
        total = sum(self._sizes.values())
        done = self._complete // _KB
        self._progress = Progress(-(-total // _KB), done=done, label="tokenising", unit="kB")
        self._start = self._last = time.monotonic()
        if complete:
            self._progress.print(f"going on: {len(complete)} of {len(units)} parts are tokenised")

    def __enter__(self) -> "_Report":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.__exit__(*exc_info)

    def update(self, done: Done) -> None:
        """Counts what has been tokenized."""
        self.documents += done.documents
        self.tokens += done.ids
        self._begun[done.unit] = done.bytes_read
        if done.last:
            del self._begun[done.unit]
            self._complete += self._sizes[done.unit]
        read = (self._complete + sum(self._begun.values())) // _KB
        self._progress.advance(read - self._progress.done)
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
