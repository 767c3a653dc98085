"""Who prepares: this process or several (the workers of Ray are in `preparation_ray`)."""

import collections
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fusedkv_jax.data import chunks, shards, tokenizers

A = TypeVar("A")
B = TypeVar("B")


class Place(NamedTuple):
    """A shard to be written; `index` is None for the held-out one."""

    path: pathlib.Path
    split: str
    index: int | None


class Done(NamedTuple):
    """A chunk, or a whole unit, that has been tokenized.

    Attributes:
      unit: its number.
      documents: in it.
      bytes_read: how far into the unit's files it reaches.
      ids: in it.
      last: whether no other follows in the unit.
    """

    unit: int
    documents: int
    bytes_read: int
    ids: int
    last: bool


@dataclasses.dataclass(frozen=True)
class PreparationJob:
    """A preparation as its workers know it.

    Attributes:
      scratch: the folder of the chunks, and of a file for each unit that is complete.
      made: the folder of the shards.
      recipe: how text becomes tokens.
      dtype: of the ids.
    """

    scratch: pathlib.Path
    made: pathlib.Path
    recipe: chunks.Recipe
    dtype: str

    def documents(self, unit: chunks.Unit) -> int | None:
        """Documents of a unit that is complete; None if it is not."""
        try:
            return int(self._mark(unit.number).read_text())
        except FileNotFoundError:
            return None

    def finish(self, unit: int, documents: int) -> None:
        """All chunks of a unit are there."""
        begun = shards.unfinished(self._mark(unit))
        begun.write_text(f"{documents}\n")
        begun.replace(self._mark(unit))

    def _mark(self, unit: int) -> pathlib.Path:
        return self.scratch / f"{unit:06d}.documents"

    def places(self) -> list[Place]:
        """All shards."""
        count = self.recipe.num_shards
        names = [("train", index, count) for index in range(count)] + [("heldout", None, 1)]
        return [
            Place(self.made / shards.shard_name(split, index or 0, of), split, index)
            for split, index, of in names
        ]


def tokenize_chunk(job: PreparationJob, chunk: chunks.TextChunk) -> Done:
    """Tokenizes a chunk, unless its file is there already."""
    path = chunks.chunk_path(job.scratch, chunk.unit.number, chunk.number)
    ids = 0
    if not path.is_file():
        ids = chunks.write(job.scratch, chunk, job.recipe, _tokenizer(job.recipe.tokenizer))
    return Done(chunk.unit.number, len(chunk.texts), chunk.bytes_read, ids, chunk.last)


def write_shard(job: PreparationJob, place: Place) -> None:
    """Puts one shard together from all chunks."""
    found = sorted(job.scratch.glob("*.safetensors"))
    chunks.write_shard(place.path, found, place.index, np.dtype(job.dtype))


@functools.lru_cache(maxsize=1)
def _tokenizer(name: str) -> tokenizers.Tokenizer:
    return tokenizers.load(name)


class Processes:
    """So many processes on this machine; one is this process.

    This process reads the text, in order; no more than two chunks for each worker are in memory.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Processes":
        if self._count > 1:
            # Not forked: the tokenizer's threads would not be.
            spawn = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._count, mp_context=spawn, initializer=_begin_worker
            )
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def tokenize(
        self, job: PreparationJob, units: Sequence[chunks.Unit], max_documents: int | None
    ) -> Iterator[Done]:
        """Tokenizes the units that are not complete; yields what is done, in order."""
        documents = 0
        waiting = _read(job, units, max_documents)
        for done in self._map(functools.partial(tokenize_chunk, job), waiting):
            documents += done.documents
            if done.last:
                job.finish(done.unit, documents)
                documents = 0
            yield done

    def assemble(self, job: PreparationJob, places: Sequence[Place]) -> None:
        """Writes shards."""
        for _ in self._map(functools.partial(write_shard, job), places):
            pass

    def _map(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        if self._pool is None:
            yield from map(function, items)
            return
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for item in items:
                pending.append(self._pool.submit(_attempt, function, item))
                if len(pending) == 2 * self._count:
                    yield _result(pending.popleft())
            while pending:
                yield _result(pending.popleft())
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker died, perhaps for want of memory; the same command goes on where it "
                "was, with fewer --workers if need be"
            ) from None


def _read(
    job: PreparationJob, units: Sequence[chunks.Unit], max_documents: int | None
) -> Iterator[chunks.TextChunk]:
    left = max_documents
    for unit in units:
        if left == 0 and not unit.heldout:
            continue
        documents = job.documents(unit)
        if documents is None:
            documents = 0
            for chunk in chunks.read(unit, job.recipe, None if unit.heldout else left):
                documents += len(chunk.texts)
                yield chunk
        if left is not None and not unit.heldout:
            left -= documents


def _begin_worker() -> None:
    """A worker has one thread, ends with the program, and leaves Ctrl-C to it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end with the program", daemon=True).start()


def _attempt(function: Callable[[A], B], item: A) -> tuple[B | None, Exception | None]:
    """What comes of a call; an expected failure is handed over as such, to be raised by us."""
    try:
        return function(item), None
    except (ValueError, OSError, MemoryError) as error:
        return None, error


def _result(future: concurrent.futures.Future) -> Any:
    result, error = future.result()
    if error is not None:
        raise error
    return result
