"""A worker takes cells of a study until none is left; others may work beside it."""

import dataclasses
import functools
import math
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from experiments.common import runs
from experiments.common.documents import Document
from experiments.study import corpus, plan, recalled, records
from experiments.study.claims import claim
from experiments.study.grid import Cell, Study
from fusedkv_jax.sharding import MeshConfig, make_mesh
from fusedkv_jax.training import DivergedError, evaluate, load_model
from fusedkv_jax.training.config import first_difference
from fusedkv_jax.training.evaluation import make_eval_step

SECONDS_BETWEEN_LOOKS = 60.0
Losses = Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Worker:
    """What a worker needs.

    Attributes:
      study: the grid.
      texts: what it trains and evaluates on.
      workdir: holds the tokens, and the unfinished runs of all workers.
      output: the folder that the records go to.
      sizes, rows: only these; None for all.
    """

    study: Study
    texts: corpus.Texts
    workdir: pathlib.Path
    output: pathlib.Path
    sizes: Sequence[str] | None = None
    rows: Sequence[str] | None = None

    @functools.cached_property
    def identity(self) -> Document:
        """What identifies tokenizer and texts; made by the first worker that asks."""
        return corpus.tokenize(self.texts, self.study.vocab_size, self.workdir / "corpus")

    def work(self) -> None:
        """Complete every cell that no other worker completes.

        Raises:
          runs.Interrupted: a signal ended a run, whose state is saved.
          ValueError: a record or a work directory belongs to something else.
        """
        while True:
            cells = self._open_cells()
            if not cells:
                return
            if not any(self.complete(cell) for cell in cells):
                # More may follow from them, and their workers may die.
                print(f"waiting for other workers' {cells[0].name}", flush=True)
                time.sleep(SECONDS_BETWEEN_LOOKS)

    def _open_cells(self) -> list[Cell]:
        done = records.losses(records.read_all(self.output, self.study))
        cells = dict.fromkeys(plan.wanted(self.study, done, self.sizes, self.rows))
        return [cell for cell in cells if cell not in done]

    def complete(self, cell: Cell) -> bool:
        """Complete a cell unless another worker has it or has just completed it."""
        with claim(self.workdir / "claims" / cell.name) as mine:
            if not mine or (self.output / f"{cell.name}.json").exists():
                return False
            record = self.run(cell, self.workdir / "runs" / cell.name)
            path = records.write(self.output, record)
            loss = records.loss_of(record)
            print(
                f"{cell.name}: {loss:.4f} nats per token, {record['seconds']:.0f} s, {path}",
                flush=True,
            )
            shutil.rmtree(self.workdir / "runs" / cell.name)
        return True

    def run(self, cell: Cell, folder: pathlib.Path) -> records.Record:
        """Train a cell in a folder, or go on there; evaluate it; returns its record."""
        identity = self.identity
        start, before = time.perf_counter(), runs.seconds(folder)
        try:
            finished = runs.complete(self.study.config(cell, self.workdir / "corpus"), folder)
        except DivergedError:
            nothing = {"loss": math.nan, "bits_per_byte": math.nan}
            losses: Losses = dict.fromkeys(("heldout", *self.texts.others), nothing)
            groups: Mapping[str, Losses] = {}
        else:
            heldout = {"loss": finished.loss, "bits_per_byte": finished.bits_per_byte}
            others, groups = self._evaluate(folder)
            losses = {"heldout": heldout, **others}
        jax.clear_caches()  # the programs of one run are of no use to the next
        seconds = before + time.perf_counter() - start
        return records.make(self.study, cell, identity, losses, seconds) | {"groups": groups}

    def _evaluate(self, folder: pathlib.Path) -> tuple[Losses, Mapping[str, Losses]]:
        """Losses on the other texts, and on the groups of targets of every text."""
        mesh = make_mesh(MeshConfig(devices=1))
        losses, groups = {}, {}
        with jax.set_mesh(mesh):
            model, config, _ = load_model(folder, mesh=mesh)
            graphdef, params = nnx.split(model)
            eval_step = make_eval_step(graphdef, logits_mib=config.train.logits_mib)
            for name, path in {"heldout": self.texts.heldout, **self.texts.others}.items():
                batches = corpus.batches(path, config.data)
                groups[name] = recalled.losses(model, batches, self._common_pairs)
                if name != "heldout":  # which training has evaluated
                    found = evaluate(eval_step, params, batches, mesh).metrics
                    losses[name] = {key: found[key] for key in ("loss", "bits_per_byte")}
        return losses, groups

    @functools.cached_property
    def _common_pairs(self) -> np.ndarray:
        return recalled.common_pairs(corpus.training(self.workdir / "corpus"))


def check(worker: Worker, name: str) -> str | None:
    """Run a recorded cell again, from the start, and compare the losses.

    Args:
      worker: its study, texts and work directory; its output holds the records.
      name: of the cell.

    Returns:
      None where every loss is that of the record, to the last bit; otherwise what differs.

    Raises:
      ValueError: no such record, or it was made from other texts.
    """
    found = {records.cell_of(r).name: r for r in records.read_all(worker.output, worker.study)}
    if name not in found:
        known = ", ".join(list(found)[:3]) or "none"
        raise ValueError(
            f"--check={name}: there is no such record; {len(found)} exist: {known} ..."
        )
    old, cell = found[name], records.cell_of(found[name])
    if worker.identity != old["corpus"]:
        other = first_difference(old["corpus"], worker.identity)
        raise ValueError(f"--check={name}: the record was made from another text, {other}")
    folder = worker.workdir / "checks" / name
    with claim(worker.workdir / "claims" / f"check-{name}") as mine:
        if not mine:
            raise ValueError(f"--check={name} runs already; wait for it")
        new = worker.run(cell, folder)
        shutil.rmtree(folder)
    return difference(old, new)


def difference(old: records.Record, new: records.Record) -> str | None:
    """How the losses of two runs of a cell differ, and what may be why; None if they are equal."""
    if new["losses"] == old["losses"]:
        return None
    ours, theirs = records.loss_of(new), records.loss_of(old)
    apart = math.inf if math.inf in (ours, theirs) else abs(ours - theirs)
    where = _other_environment(old["environment"], new["environment"])
    reason = f"another environment: {where}" if where else "the environments are equal"
    name = records.cell_of(old).name
    return f"{name}: {ours:.6f} nats per token, recorded {theirs:.6f}, {apart:.2g} apart; {reason}"


def _other_environment(old: Document, new: Document) -> str:
    """All differences, but in what no computation depends on."""
    names = [name for name in old if old[name] != new.get(name)]
    return "; ".join(f"{name}: {old[name]} -> {new.get(name)}" for name in names)
