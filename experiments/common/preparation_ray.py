"""A preparation on Ray Data: the workers of a cluster read, tokenize and write.

Every worker sees the input, the output and the tokenizer under the same names.
One worker reads and tokenizes all files of a unit, one writes a shard; no text goes through Ray.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.common import preparation_workers as local
from experiments.common.preparation_workers import Done, Place, PreparationJob
from fusedkv_jax.data import chunks

Row = dict[str, Any]


class Ray:
    """The workers of a Ray cluster.

    Args:
      address: as for `ray.init`: "auto" for the cluster of this machine or of RAY_ADDRESS,
        "local" for one that is started here for the while, or that of a cluster.

    Raises:
      ValueError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
            import ray.data
        except ImportError:
            raise ValueError("--ray needs Ray; pip install 'ray[data]'") from None
        self._address, self._ray = address, ray

    def __enter__(self) -> "Ray":
        try:
            own = {"include_dashboard": False} if self._address == "local" else {}
            self._ray.init(self._address, log_to_driver=False, logging_level="ERROR", **own)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"--ray={self._address}: no cluster answers: {reason}") from None
        context = self._ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ray.shutdown()

    def tokenize(
        self, job: PreparationJob, units: Sequence[chunks.Unit], max_documents: int | None
    ) -> Iterator[Done]:
        """Tokenizes the units that are not complete; yields them, in any order."""
        assert max_documents is None
        rows = [
            {"number": unit.number, "files": list(map(str, unit.files)), "heldout": unit.heldout}
            for unit in units
            if job.documents(unit) is None
        ]
        for row in self._map(functools.partial(_tokenize_unit, job), rows):
            yield Done(row["number"], row["documents"], row["bytes_read"], row["ids"], last=True)

    def assemble(self, job: PreparationJob, places: Sequence[Place]) -> None:
        """Writes shards."""
        rows = [{"place": job.places().index(place)} for place in places]
        for _ in self._map(functools.partial(_write_shard, job), rows):
            pass

    def _map(self, function: Callable[[Row], Row], rows: list[Row]) -> Iterator[Row]:
        if not rows:
            return
        dataset = self._ray.data.from_items(rows, override_num_blocks=len(rows))
        for row in dataset.map(functools.partial(_attempt, function)).iter_rows():
            if row["errno"]:
                raise OSError(row["errno"], row["error"], row["file"])
            if row["error"]:
                raise ValueError(row["error"])
            yield json.loads(row["result"])


def _attempt(function: Callable[[Row], Row], row: Row) -> Row:
    """What comes of a row; an expected failure is a row too, for Ray would try again."""
    try:
        return {"result": json.dumps(function(row)), "errno": 0, "error": "", "file": ""}
    except OSError as error:
        number, words = error.errno or 5, error.strerror or str(error)
        file = str(error.filename or "")
        return {"result": "", "errno": number, "error": words, "file": file}
    except ValueError as error:
        return {"result": "", "errno": 0, "error": str(error), "file": ""}


def _tokenize_unit(job: PreparationJob, row: Row) -> Row:
    files = tuple(map(pathlib.Path, row["files"]))
    unit = chunks.Unit(int(row["number"]), files, bool(row["heldout"]))
    done = [local.tokenize_chunk(job, chunk) for chunk in chunks.read(unit, job.recipe)]
    documents = sum(each.documents for each in done)
    job.finish(unit.number, documents)
    ids = sum(each.ids for each in done)
    return {
        "number": unit.number,
        "documents": documents,
        "bytes_read": done[-1].bytes_read,
        "ids": ids,
    }


def _write_shard(job: PreparationJob, row: Row) -> Row:
    local.write_shard(job, job.places()[row["place"]])
    return {}
