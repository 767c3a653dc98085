"""python -m experiments.reproduce --study=NAME --data=FOLDER: be one worker of a study.

Start it as often as there are devices or cores, on one file system; each takes cells of the grid
that no other has. SIGTERM and SIGINT save and exit with code 75, and the same command goes on;
SIGSTOP and SIGCONT pause. Records, tables and pictures are left in --output, complete or not;
--report writes the latter two anew, and --check runs one recorded cell again.
"""

import importlib
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from absl import flags

from experiments.common import cli, runs
from experiments.study.grid import Study
from fusedkv_jax import training
from fusedkv_jax.validation import nearest_or_all

if TYPE_CHECKING:
    from experiments.study.statistics import Estimate
    from experiments.study.worker import Worker

FLAGS = flags.FLAGS

GRIDS = ("scaling",)  # of language models, on text
_USELESS = {
    "recall": ("data", "sizes"),
    "retrieval": ("sizes", "questions", "layouts"),
    "paper": ("sizes", "questions", "layouts"),
}
STUDIES = (*GRIDS, "recall", "retrieval", "paper")


def define_flags() -> None:
    """Define the flags that only a study has, and say which ones it has no use for."""
    cli.only_with("data sizes questions check report", study=True)
    cli.only_with("config override seeds", study=False)
    flags.DEFINE_string("study", None, f"The study to work on: {', '.join(STUDIES)}.")
    flags.DEFINE_string(
        "data",
        None,
        "With --study=scaling or paper: the folder of the text, train.*, valid.* and NAME.valid.*; "
        "with --study=retrieval the same, without which it measures no losses.",
    )
    flags.DEFINE_list("sizes", [], "With --study=scaling: the sizes to train, by default all.")
    flags.DEFINE_list(
        "questions", [], "With --study=recall: the questions to answer, by default all."
    )
    flags.DEFINE_string(
        "check", None, "With --study: run this recorded cell again and compare the loss."
    )
    flags.DEFINE_boolean(
        "report", False, "With --study: train nothing; tables and pictures from the records."
    )


def main() -> int:
    """Do what the flags say; returns the exit code."""
    _known("study", [FLAGS.study], STUDIES)
    _refuse(*_USELESS.get(FLAGS.study, ("questions",)))
    if FLAGS.study not in GRIDS:
        return importlib.import_module(f"experiments.study.{FLAGS.study}.command").main()
    from experiments.study import corpus
    from experiments.study.worker import Worker

    study = load(FLAGS.study)
    workdir = pathlib.Path(FLAGS.workdir or f"runs/{study.name}")
    output = pathlib.Path(FLAGS.output or workdir / "results")
    if FLAGS.report:
        return _report(study, output)
    worker = Worker(
        study,
        corpus.Texts.find(pathlib.Path(cli.require("data"))),
        workdir,
        output / "records",
        _known("sizes", FLAGS.sizes, study.sizes),
        _known("layouts", FLAGS.layouts, study.rows),
    )
    cli.check_output(output, folder=True)
    try:
        if FLAGS.check is not None:
            return _check(worker, FLAGS.check)
        worker.work()
    except runs.Interrupted as stop:
        print(stop, file=sys.stderr)
        return training.INTERRUPTED_EXIT_CODE
    return _report(study, output)


def load(name: str) -> Study:
    """The grid of a name.

    Raises:
      ValueError: there is none.
    """
    _known("study", [name], GRIDS)
    return importlib.import_module(f"experiments.study.{name}").get_study()


def _check(worker: "Worker", name: str) -> int:
    from experiments.study.worker import check

    difference = check(worker, name)
    print(difference or f"{name}: the recorded losses, to the last bit")
    return 1 if difference else 0


def _report(study: Study, output: pathlib.Path) -> int:
    from experiments.study import records, report
    from experiments.study.statistics import lines

    print(report.write(study, output / "records", output))
    results = lines(study, records.read_all(output / "records", study))
    rows = [
        {
            "size": line.size,
            "row": line.row,
            "loss": _plain(line.loss),
            **{f"minus_{name}": _plain(found) for name, found in line.against.items()},
        }
        for line in results
    ]
    print(json.dumps({"study": study.name, "rows": rows}))
    return 0


def _plain(estimate: "Estimate") -> dict[str, float | int | None]:
    return {"mean": estimate.mean, "runs": estimate.count, "half_width": estimate.half_width}


def _refuse(*names: str) -> None:
    for name in names:
        if FLAGS[name].present:
            raise ValueError(f"--{name} has no effect with --study={FLAGS.study}; leave it out")


def _known(flag: str, names: list[str], known: Iterable[str]) -> list[str] | None:
    """The names, if all are known; None without any."""
    for name in names:
        if name not in known:
            raise ValueError(f"--{flag}={name} is unknown{nearest_or_all(name, known)}")
    return names or None
