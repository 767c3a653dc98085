"""python -m experiments.reproduce --study=retrieval --data=FOLDER: be one worker of the search.

Start it as often as there are cores. Each takes the runs that no other has and that the finished
ones make possible: recall first, at the size of the search and then at the next one, then losses,
which need the text of --study=scaling. Records, the tables and the pictures are left in --output,
complete or not. Records of --study=recall and --study=scaling that are in the repository are not
made again.
"""

import json
import pathlib
import sys
import time

from absl import flags

from experiments.common import cli, runs
from experiments.study import corpus
from experiments.study import worker as losses_worker
from experiments.study.recall import worker as recall_worker
from experiments.study.retrieval import (
    confirmation,
    confirmation_report,
    losses,
    report,
    results,
    search,
)
from fusedkv_jax import training

FLAGS = flags.FLAGS
SECONDS_BETWEEN_LOOKS = 20.0


def main() -> int:
    """Do what the flags say; returns the exit code."""
    workdir = pathlib.Path(FLAGS.workdir or "runs/retrieval")
    output = pathlib.Path(FLAGS.output or workdir / "results")
    try:
        if FLAGS.check is not None:
            return _check(workdir, output / "records", FLAGS.check)
        if not FLAGS.report:
            cli.check_output(output, folder=True)
            _work(workdir, output / "records")
    except runs.Interrupted as stop:
        print(stop, file=sys.stderr)
        return training.INTERRUPTED_EXIT_CODE
    found = results.read(output / "records")
    print(report.write(found, output))
    later = confirmation_report.read(output / "records")
    print(confirmation_report.write(later, output))
    form = confirmation.chosen(results.accuracies(output / "records"))
    print(json.dumps({"study": "retrieval", "front": results.front(found), "form": form}))
    return 0


def _work(workdir: pathlib.Path, folder: pathlib.Path) -> None:
    """Complete all runs, losses only where there is text for them."""
    text = _losses(workdir, folder) if FLAGS.data is not None else None
    while True:
        accuracies = results.accuracies(folder)
        missing = [cell for cell in search.cells(accuracies) if cell not in accuracies]
        if not missing:
            missing = [cell for cell in confirmation.cells(accuracies) if cell not in accuracies]
        known = results.losses_of(folder)
        unread = [cell for cell in losses.cells(accuracies) if text and cell not in known]
        if not missing and not unread:
            return
        # One at a time: each may change what is most urgent.
        recalled = (
            recall_worker.complete(cell, folder / "recall", workdir / "claims") for cell in missing
        )
        read = (text.complete(cell) for cell in unread if text)
        if not any(recalled) and not any(read):
            print("waiting for other workers", flush=True)
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _losses(workdir: pathlib.Path, folder: pathlib.Path) -> losses_worker.Worker:
    texts = corpus.Texts.find(pathlib.Path(cli.require("data")))
    return losses_worker.Worker(losses.study(), texts, workdir, folder / "loss")


def _check(workdir: pathlib.Path, folder: pathlib.Path, name: str) -> int:
    if (folder / "loss" / f"{name}.json").exists():
        difference = losses_worker.check(_losses(workdir, folder), name)
    else:
        difference = recall_worker.check(folder / "recall", name)
    print(difference or f"{name}: the recorded numbers, to the last digit")
    return 1 if difference else 0
