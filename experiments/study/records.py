"""One JSON file for each finished run: what it was, where and when it ran, and what came out."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments.common.documents import Document, Row
from experiments.study.grid import Cell, Seeds, Study, non_embedding
from fusedkv_jax import costs, processes
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.training import OptimizerConfig
from fusedkv_jax.training.config import first_difference

VERSION = 1
Record = Document


def make(
    study: Study,
    cell: Cell,
    corpus: Row,
    losses: Mapping[str, Mapping[str, float]],
    seconds: float,
) -> Record:
    """The record of a finished run.

    Args:
      study, cell: which run.
      corpus: what identifies tokenizer and texts.
      losses: metrics of each evaluated text, `heldout` among them; not finite where it diverged.
      seconds: of training, evaluation and compilation.
    """
    model = study.model(cell.size, cell.row)
    tokens = study.tokens(cell.size)
    flops = costs.train_flops_per_token(model, study.seq_len)
    return {
        "version": VERSION,
        "study": study.name,
        "cell": cell.to_dict(),
        "losses": {
            text: {name: value if math.isfinite(value) else None for name, value in found.items()}
            for text, found in losses.items()
        },
        "settings": settings(study, cell),
        "parameters": costs.parameter_count(model),
        "non_embedding_parameters": non_embedding(model),
        "cache_bytes_per_token": costs.cache_bytes_per_token(model, model.dtype),
        "train_tokens": tokens,
        "train_flops": flops * tokens,
        "seconds": round(seconds, 1),
        "corpus": dict(corpus),
        "environment": environment(),
    }


def settings(study: Study, cell: Cell) -> Document:
    """Everything that the run's loss depends on, but its text; no path of the machine."""
    config: Document = study.config(cell, pathlib.Path("corpus")).to_dict()
    data = {name: config["data"][name] for name in ("seq_len", "batch_size", "seed", "packing")}
    return plain({"model": config["model"], "data": data, "optimizer": config["optimizer"]}) | {
        "train": {name: config["train"][name] for name in ("steps", "seed", "grad_accumulation")}
    }


def environment() -> Document:
    """Device, versions, the cores that the process may use, and the commit of the code."""
    return processes.environment() | {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "devices": len(jax.local_devices()),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout, with "+" where files that git knows are changed."""
    folder = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write(folder: pathlib.Path, record: Record) -> pathlib.Path:
    """Leave a record in a folder, whole or not at all; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{cell_of(record).name}.json"
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_all(folder: pathlib.Path, study: Study) -> list[Record]:
    """The records of a study in a folder, in the order of its grid; none if it does not exist.

    Raises:
      ValueError: a file is no record of this study, or was made with other settings.
    """
    records = [_read(path, study) for path in sorted(folder.glob("*.json"))]
    places = {name: i for i, name in enumerate([*study.sizes, *study.rows])}

    def place(record: Record) -> tuple[int, int, Seeds, float]:
        cell = cell_of(record)
        return places[cell.size], places[cell.row], cell.draw, cell.learning_rate

    return sorted(records, key=place)


def _read(path: pathlib.Path, study: Study) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        cell = cell_of(record)
        expected, made = settings(study, cell), _with_defaults(record["settings"])
        if (record["version"], record["study"]) != (VERSION, study.name):
            raise KeyError
        loss_of(record)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no record of --study={study.name}; move it away") from None
    different = first_difference(made, expected)
    if different:
        raise ValueError(f"{path} was made with another setting, {different}; move it away")
    return record


def _with_defaults(found: Row) -> Document:
    """Settings with the fields that configurations have got since, at their defaults."""
    model = ModelConfig.from_dict(found["model"]).to_dict()
    optimizer = dataclasses.asdict(OptimizerConfig(**found["optimizer"]))
    return {**found, "model": plain(model), "optimizer": optimizer}


def cell_of(record: Row) -> Cell:
    """Which run a record is of."""
    return Cell.from_dict(record["cell"])


def loss_of(record: Row, text: str = "heldout") -> float:
    """Loss in nats per token on a text; infinite for a run that diverged."""
    loss = record["losses"][text]["loss"]
    return math.inf if loss is None else loss


def losses(records: Sequence[Record]) -> dict[Cell, float]:
    """Held-out loss of each cell."""
    return {cell_of(record): loss_of(record) for record in records}


def plain(values: Any) -> Any:
    """As JSON would give it back."""
    return json.loads(json.dumps(values))
