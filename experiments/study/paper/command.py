"""python -m experiments.reproduce --study=paper --data=FOLDER: be one worker of it.

Start it as often as there are cores; the text is that of --study=scaling, whose committed records
are read and not made again. Records, the table and the pictures are left in --output, complete or
not.
"""

import dataclasses
import json
import pathlib
import sys
import time

from absl import flags

from experiments.common import cli, runs
from experiments.study import corpus, records
from experiments.study.grid import Cell
from experiments.study.paper import grids, probes, report
from experiments.study.worker import Worker, check
from fusedkv_jax import training

FLAGS = flags.FLAGS
SECONDS_BETWEEN_LOOKS = 20.0


@dataclasses.dataclass(frozen=True)
class ProbingWorker(Worker):
    """A worker that looks inside the models it has trained."""

    def run(self, cell: Cell, folder: pathlib.Path) -> records.Record:
        """As `Worker.run`; the record has what `probes.measure` finds, if the run is finite."""
        record = super().run(cell, folder)
        finite = record["losses"]["heldout"]["loss"] is not None
        return record | {"inside": probes.measure(folder) if finite else None}


def main() -> int:
    """Do what the flags say; returns the exit code."""
    workdir = pathlib.Path(FLAGS.workdir or "runs/paper")
    output = pathlib.Path(FLAGS.output or workdir / "results")
    try:
        if FLAGS.check is not None:
            return _check(workdir, output / "records", FLAGS.check)
        if not FLAGS.report:
            workers = _workers(workdir, output / "records")
            cli.check_output(output, folder=True)
            _work(workers)
    except runs.Interrupted as stop:
        print(stop, file=sys.stderr)
        return training.INTERRUPTED_EXIT_CODE
    found = report.read(output / "records")
    print(report.write(found, output))
    counts = {"ablation": len(found.ablation), "depth": len(found.depth)}
    print(json.dumps({"study": "paper", "runs": counts}))
    return 0


def _workers(workdir: pathlib.Path, folder: pathlib.Path) -> dict[str, Worker]:
    texts = corpus.Texts.find(pathlib.Path(cli.require("data")))
    return {
        "ablation": Worker(grids.ablation(), texts, workdir, folder / "ablation"),
        "depth": ProbingWorker(grids.depth(), texts, workdir, folder / "depth"),
    }


def _work(workers: dict[str, Worker]) -> None:
    """Complete all runs."""
    while True:
        missing = [
            (part, cell)
            for part, cell in grids.cells()
            if not (workers[part].output / f"{cell.name}.json").exists()
        ]
        if not missing:
            return
        if not any(workers[part].complete(cell) for part, cell in missing):
            print("waiting for other workers", flush=True)
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _check(workdir: pathlib.Path, folder: pathlib.Path, name: str) -> int:
    parts = {cell.name: part for part, cell in grids.cells()}
    if name not in parts:
        raise ValueError(f"--check={name}: there is no such run; one is {next(iter(parts))}")
    difference = check(_workers(workdir, folder)[parts[name]], name)
    print(difference or f"{name}: the recorded losses, to the last bit")
    return 1 if difference else 0
