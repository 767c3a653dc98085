"""Trains the cells that have no record, one after the other, and leaves a JSON file of each."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from experiments.common.documents import Document
from experiments.study import records
from experiments.study.claims import claim
from experiments.study.recall import probes
from experiments.study.recall.cells import Cell
from experiments.study.recall.frameworks import Learner, learner
from fusedkv_jax.data import make_train_iterator

VERSION = 1
LOOKS = 20  # at the accuracy while a cell trains
EXAMPLES = {"curve": 16, "final": 64}  # of each task


def work(cells: Iterable[Cell], folder: pathlib.Path, claims: pathlib.Path) -> None:
    """Complete every cell that no other worker completes; one that is cut off begins anew."""
    for cell in cells:
        complete(cell, folder, claims)


def complete(cell: Cell, folder: pathlib.Path, claims: pathlib.Path) -> bool:
    """Complete a cell, unless it is done or another worker has it; whether this worker did."""
    path = folder / f"{cell.name}.json"
    with claim(claims / cell.name) as mine:
        if not mine or path.exists():
            return False
        record = run(cell)
        write(path, record)
        accuracy = mean(record["final"])
        print(f"{cell.name}: accuracy {accuracy:.3f}, {record['seconds']:.0f} s", flush=True)
    return True


def run(cell: Cell) -> Document:
    """Train a cell; its record: the curve, the accuracies at the end, and where it ran."""
    start, model = time.perf_counter(), learner(cell)
    curve = list(_curve(cell, model))
    vocabulary = cell.config().model.vocab_size
    return {
        "version": VERSION,
        "study": "recall",
        "cell": dataclasses.asdict(cell),
        "curve": curve,
        "final": probes.accuracies(model, vocabulary, cell.seq_len, EXAMPLES["final"]),
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environment(),
    }


def _curve(cell: Cell, model: Learner) -> Iterator[Document]:
    """What is seen every LOOKS-th part of the steps; the loss is the mean since the last look."""
    config = cell.config()
    batches, losses = make_train_iterator(config.data), []
    for step in range(cell.steps):
        losses.append(model.step(next(batches), step)[0])
        if (step + 1) % max(cell.steps // LOOKS, 1) and step + 1 < cell.steps:
            continue
        vocabulary = config.model.vocab_size
        accuracy = probes.accuracies(model, vocabulary, cell.seq_len, EXAMPLES["curve"])
        seen = probes.circuits(model, vocabulary) or {}
        loss, score = float(np.mean(losses)), mean(accuracy)
        where = f"{cell.name}: step {step + 1} of {cell.steps}"
        print(f"{where}, loss {loss:.3f}, accuracy {score:.3f}", file=sys.stderr, flush=True)
        yield _rounded({"step": step + 1, "loss": loss, "accuracy": accuracy, **seen})
        losses.clear()


def _rounded(value: Any) -> Any:
    """Four digits are more than any of these numbers has."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def environment() -> Document:
    """As of other studies' records, and PyTorch's version."""
    version = None
    if importlib.util.find_spec("torch"):
        import torch

        version = torch.__version__
    return records.environment() | {"torch": version}


def write(path: pathlib.Path, record: Document) -> None:
    """Leave a record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_all(folder: pathlib.Path) -> list[Document]:
    """All records of a folder.

    Raises:
      ValueError: a file is no record of this study.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if (record["version"], record["study"]) != (VERSION, "recall"):
                raise KeyError
            if Cell.from_dict(record["cell"]).name != path.stem:
                raise KeyError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no record of --study=recall; move it away") from None
        found.append(record)
    return found


def mean(accuracies: dict[str, float]) -> float:
    """Over the tasks."""
    return float(np.mean(list(accuracies.values())))


def check(folder: pathlib.Path, name: str) -> str | None:
    """Run a recorded cell again; what differs, or None where every number is the record's.

    Raises:
      ValueError: there is no such record.
    """
    found = {Cell.from_dict(record["cell"]).name: record for record in read_all(folder)}
    if name not in found:
        known = ", ".join(list(found)[:3]) or "none"
        raise ValueError(
            f"--check={name}: there is no such record; {len(found)} exist: {known} ..."
        )
    old = found[name]
    new = run(Cell.from_dict(old["cell"]))
    if all(json.loads(json.dumps(new[part])) == old[part] for part in ("curve", "final")):
        return None
    ours, theirs = mean(new["final"]), mean(old["final"])
    other = [
        key for key in old["environment"] if old["environment"][key] != new["environment"][key]
    ]
    where = f"; another environment: {', '.join(other)}" if other else ""
    return f"{name}: accuracy {ours:.4f}, recorded {theirs:.4f}{where}"
