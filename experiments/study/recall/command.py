"""python -m experiments.reproduce --study=recall: train the runs that have no record yet.

Start it as often as there are cores; each takes runs that no other has. Records, a table and the
curves are left in --output, complete or not. A run that is cut off begins anew: it takes minutes.
"""

import json
import pathlib

from absl import flags

from experiments.common import cli
from experiments.study.recall import report, worker
from experiments.study.recall.questions import QUESTIONS, cells
from fusedkv_jax.validation import nearest_or_all

FLAGS = flags.FLAGS


def main() -> int:
    """Do what the flags say; returns the exit code."""
    workdir = pathlib.Path(FLAGS.workdir or "runs/recall")
    output = pathlib.Path(FLAGS.output or workdir / "results")
    records = output / "records"
    if FLAGS.check is not None:
        difference = worker.check(records, FLAGS.check)
        print(difference or f"{FLAGS.check}: the recorded numbers, to the last digit")
        return 1 if difference else 0
    if not FLAGS.report:
        chosen = list(cells(_questions(), FLAGS.layouts))
        cli.check_output(output, folder=True)
        worker.work(chosen, records, workdir / "claims")
    print(report.write(records, output))
    print(json.dumps({"study": "recall", "runs": report.summary(records)}))
    return 0


def _questions() -> list[str] | None:
    known = [question.name for question in QUESTIONS]
    for name in FLAGS.questions:
        if name not in known:
            raise ValueError(f"--questions={name} is unknown{nearest_or_all(name, known)}")
    return FLAGS.questions or None
