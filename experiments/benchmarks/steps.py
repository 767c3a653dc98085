"""Steps of a long measurement, each a command of its own: what is finished is not run again."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import time
import xml.etree.ElementTree as xml
from collections.abc import Iterator, Mapping

from experiments.benchmarks.report import Measurement
from experiments.common.documents import Document, Row

_GRACE = 60  # seconds from SIGTERM, at which a run of training saves, to SIGKILL


@dataclasses.dataclass(frozen=True)
class Step:
    """A command, and where its result lies.

    Attributes:
      part: what it belongs to.
      name: of its result file, without the ending.
      command: the words of it. Its last line on standard output is a JSON document, but
        `{junit}` among the words stands for a file that pytest writes, and is the result instead.
      limit: seconds after which it has failed; None for no limit.
    """

    part: str
    name: str
    command: tuple[str, ...]
    limit: float | None = None


def read(step: Step, folder: pathlib.Path) -> Document | None:
    """What a step left: its state (`done` or `failed`), seconds and result; None if nothing."""
    try:
        return json.loads((folder / f"{step.name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def run(
    step: Step,
    folder: pathlib.Path,
    logs: pathlib.Path,
    *,
    environment: Mapping[str, str],
    root: pathlib.Path,
    seconds: float | None,
) -> Document | None:
    """Run a step and write its result file.

    Args:
      step: what to run.
      folder: of result files.
      logs: folder of what the commands print.
      environment: variables of the command.
      root: the folder in which it runs.
      seconds: limit of it, after which it is ended; none with None.

    Returns:
      As `read`; None, and no result file, if it was cut off.
    """
    junit, log = logs / f"{step.name}.xml", logs / f"{step.name}.log"
    command = [str(junit) if word == "{junit}" else word for word in step.command]
    for stale in (junit, log):
        stale.unlink(missing_ok=True)
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command,
            cwd=root,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # so that what it starts ends with it
        )
        with _ended(process):
            try:
                limits = [x for x in (seconds, step.limit) if x is not None]
                printed, _ = process.communicate(timeout=min(limits, default=None))
            except subprocess.TimeoutExpired:
                if step.limit is None or seconds is not None and seconds < step.limit:
                    return None
                print(f"ended: not done after {step.limit:g} seconds", file=errors)
                printed = ""
    with open(log, "a", encoding="utf-8") as file:
        file.write(printed)
    result = _junit(junit) if "{junit}" in step.command else _last_line(printed)
    failed = process.returncode != 0 or result is None
    found = {
        "part": step.part,
        "state": "failed" if failed else "done",
        "seconds": round(time.monotonic() - start, 1),
        "command": " ".join(step.command),
        "result": result,
    }
    if failed:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
        found["last_lines"] = lines[-5:]
    path = folder / f"{step.name}.json"
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(whole, path)
    return found


@contextlib.contextmanager
def _ended(process: subprocess.Popen) -> Iterator[None]:
    """End the process and all that it started, if the block leaves it running."""
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=_GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(printed: str) -> Document | None:
    try:
        document = json.loads(printed.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return None
    return document if isinstance(document, dict) else None


def _junit(path: pathlib.Path) -> Document | None:
    """How many tests passed and were skipped, and the names of those that failed."""
    if not path.exists():
        return None
    cases = list(xml.parse(path).iter("testcase"))
    failed = [
        case.get("name")
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    if not cases or skipped == len(cases):  # nothing was tested
        return None
    passed = len(cases) - len(failed) - skipped
    return {"passed": passed, "skipped": skipped, "failed": failed}


def markdown(device: str, plan: list[Step], folder: pathlib.Path) -> str:
    """All that the steps have left so far: their states, then the tables of each."""
    lines = [
        f"# {device}",
        "",
        "| part | step | state | seconds | outcome |",
        "|---|---|---|---:|---|",
    ]
    tables: list[str] = []
    for step in plan:
        found = read(step, folder) or {"state": "to do", "seconds": "", "result": None}
        lines.append(
            f"| {step.part} | {step.name} | {found['state']} | {found['seconds']} "
            f"| {_outcome(found)} |"
        )
        measured = (found["result"] or {}).get("measurements", {})
        for name, fields in measured.items():
            title, *rest = Measurement.from_dict(fields).text().splitlines()
            body = [line.removeprefix("  ") for line in rest]
            tables += ["", f"## {name}: {title}", "", "```", *body, "```"]
    return "\n".join([*lines, *tables]) + "\n"


def _outcome(found: Row) -> str:
    result = found["result"] or {}
    if "passed" in result:
        failed = "".join(f", {name} failed" for name in result["failed"])
        return f"{result['passed']} passed, {result['skipped']} skipped{failed}"
    if "targets_met" in result:
        return f"{result['targets_met']} of {result['targets']} targets met"
    if found.get("last_lines"):
        return found["last_lines"][-1].replace("|", "/")[:200]
    return ""
