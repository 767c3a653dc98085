"""What a measurement hands back, and how it is printed."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Literal

import jax

from experiments.common.documents import Document, Row


@dataclasses.dataclass(frozen=True)
class Target:
    """A number that a measurement should reach.

    Attributes:
      name: what the number is.
      value: the number.
      relation: `<=`, `>=` or `==`.
      bound: what it is held against.
    """

    name: str
    value: float
    relation: Literal["<=", ">=", "=="]
    bound: float

    @property
    def met(self) -> bool:
        """The number is within its bound."""
        compare = {"<=": float.__le__, ">=": float.__ge__, "==": float.__eq__}
        return compare[self.relation](float(self.value), float(self.bound))

    def to_dict(self) -> Document:
        """Fields for JSON, with the verdict."""
        return {**dataclasses.asdict(self), "met": self.met}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One comparison.

    Attributes:
      title: what was measured, for people.
      setting: geometry and lengths that the numbers hold for.
      rows: one mapping of column to value for each contestant.
      targets: what the numbers should reach.
      skipped: why there are no rows, otherwise empty.
    """

    title: str
    setting: Row = dataclasses.field(default_factory=dict)
    rows: Sequence[Row] = ()
    targets: Sequence[Target] = ()
    skipped: str = ""

    def to_dict(self) -> Document:
        """Fields for JSON."""
        fields = dataclasses.asdict(self)
        return {**fields, "targets": [target.to_dict() for target in self.targets]}

    @classmethod
    def from_dict(cls, fields: Row) -> "Measurement":
        """The measurement whose `to_dict` this is."""
        names = [field.name for field in dataclasses.fields(Target)]
        targets = [Target(**{name: x[name] for name in names}) for x in fields["targets"]]
        return cls(**{**fields, "targets": targets})

    def text(self) -> str:
        """Title, setting, table and targets as plain text."""
        lines = [self.title]
        if self.skipped:
            return f"{self.title}\n  skipped: {self.skipped}"
        lines += ["  " + ", ".join(f"{name} {value}" for name, value in self.setting.items())]
        lines += ["  " + line for line in _table(self.rows)]
        for target in self.targets:
            verdict = "met" if target.met else "MISSED"
            bound = f"{target.relation} {target.bound:g}"
            lines.append(f"  {target.name}: {_show(target.value)} (target {bound}): {verdict}")
        return "\n".join(lines)


def environment() -> Document:
    """The device and the versions that numbers depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
    device = jax.devices()[0]
    return {
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "versions": {"python": platform.python_version()}
        | {name: version for name in packages if (version := _version(name))},
        "flags": {name: os.environ[name] for name in ("XLA_FLAGS",) if name in os.environ},
    }


def write(stem: str, document: Row, tables: Sequence[str]) -> None:
    """The document as `stem`.json, and the tables with the device's name as `stem`.md."""
    device, versions = document["device"], document["versions"]
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"# Suite {document['suite']}", ""]
    for table in tables:
        title, *rest = table.splitlines()
        lines += [f"## {title}", "", "```", *(line.removeprefix("  ") for line in rest), "```", ""]
    lines.append(
        f"Device: {device['kind']} ({device['processor']}, {device['cores']} cores). "
        f"Versions: {names}."
    )
    pathlib.Path(f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    pathlib.Path(f"{stem}.md").write_text("\n".join(lines) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _show(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _table(rows: Sequence[Row]) -> list[str]:
    columns = list(rows[0])
    cells = [columns, *([_show(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
