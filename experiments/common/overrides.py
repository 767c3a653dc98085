"""Changing fields of a frozen configuration from text such as "train.steps=100"."""

import ast
import dataclasses
import math
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from fusedkv_jax.validation import Hint, alternatives, nearest, nearest_names

T = TypeVar("T")

_TOO_DEEP = (RecursionError, MemoryError)  # what Python's parser raises for a thousand brackets
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def apply_overrides(config: T, overrides: Sequence[str]) -> T:
    """A copy of a (nested, frozen) dataclass with other fields, validated again.

    Values are read by the type of the field; "none" empties an optional one. All changes to
    one part are made at once, so their order does not matter, and a part's own `replace`
    decides what follows from them (a named layout follows a changed number of layers).

    Args:
      config: the dataclass; its type hints are the schema.
      overrides: "path.to.field=value" each.

    Raises:
      ValueError: an unknown field (the nearest names are suggested), one that is set twice, a
        value that cannot be read, or one that the configuration refuses.
    """
    changes: dict[str, Any] = {}
    for override in overrides:
        path, found, text = override.partition("=")
        if not found:
            raise ValueError(f"{override!r} gives no value; write --config.{override}=VALUE")
        names = path.split(".")
        hint = _find_hint(type(config), names, path)
        target = changes
        for name in names[:-1]:
            target = target.setdefault(name, {})
            if not isinstance(target, dict):
                raise ValueError(f"--config.{path} changes a field of a part that is set whole")
        if names[-1] in target:
            raise ValueError(f"--config.{path} is given twice; give it once")
        target[names[-1]] = _read(hint, text, path)
    return _rebuild(config, changes)


def field_names(kind: type, prefix: str = "") -> list[str]:
    """Every dotted field path below a dataclass type."""
    names = []
    for name, hint in typing.get_type_hints(kind).items():
        inner = dataclass_of(hint)
        names += field_names(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return names


def _find_hint(kind: type, names: list[str], path: str) -> Hint:
    root, hint = kind, kind
    for name in names:
        inner = dataclass_of(hint)
        known = typing.get_type_hints(inner) if inner else {}
        if name not in known:
            raise ValueError(f"unknown field --config.{path}; {_suggest(root, path)}")
        hint = known[name]
    return hint


def _suggest(root: type, path: str) -> str:
    everything = field_names(root)
    # A right name in the wrong part ("steps" for "train.steps") is the commonest slip.
    last = path.rsplit(".", 1)[-1]
    near = [name for name in everything if name.rsplit(".", 1)[-1] == last]
    near += [n for n in nearest_names(path, everything) if n not in near]
    if not near:
        return "fields are " + ", ".join(field.name for field in dataclasses.fields(root))
    return "did you mean " + " or ".join(f"--config.{name}" for name in near[:3]) + "?"


def dataclass_of(hint: Hint) -> type | None:
    """The dataclass that a field's fields are set in, if it has any.

    A type that can also be written as text (a layout) is a value, not a part.
    """
    kinds = alternatives(hint)
    if str in kinds:
        return None
    parts = (kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind))
    return next(parts, None)


def _read(hint: Hint, text: str, path: str) -> object:
    kinds = alternatives(hint)
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            return _read_choice(typing.get_args(kind), text, path)
        reader = _READERS.get(typing.get_origin(kind) or kind)
        if reader is not None:
            try:
                return reader(text)
            except (ValueError, ArithmeticError, SyntaxError, KeyError, TypeError, *_TOO_DEEP):
                expected = getattr(kind, "__name__", str(kind))
                raise ValueError(f"--config.{path}={text} is not of type {expected}") from None
    fields = ", ".join(field_names(dataclass_of(hint) or type(None), f"--config.{path}."))
    raise ValueError(f"--config.{path} cannot be set whole; set its fields {fields}")


def _read_choice(choices: tuple[object, ...], text: str, path: str) -> object:
    for choice in choices:
        if str(choice) == text:
            return choice
    known = list(map(str, choices))
    near = nearest(text, known)
    raise ValueError(f"--config.{path}={text}: choose {', '.join(known)}{near}")


def _read_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        value = float(text)  # 1e5 is a usual way to write a number of steps
        if not value.is_integer():
            raise
        return int(value)


def _read_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _read_tuple(text: str) -> tuple[object, ...]:
    value = ast.literal_eval(text)
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


_READERS = {
    bool: lambda text: _BOOLEANS[text.lower()],
    int: _read_int,
    float: _read_float,
    str: str,
    tuple: _read_tuple,
}


def _rebuild(config: Any, changes: dict[str, Any]) -> Any:
    if not changes:
        return config
    hints = typing.get_type_hints(type(config))
    values = {}
    for name, change in changes.items():
        kind = dataclass_of(hints[name])
        if kind is not None and isinstance(change, dict):
            old = getattr(config, name)
            change = _make(kind, change, name) if old is None else _rebuild(old, change)
        values[name] = change
    if hasattr(config, "replace"):
        return config.replace(**values)
    return dataclasses.replace(config, **values)


def _make(kind: type, values: dict[str, Any], name: str) -> Any:
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in values
    ]
    if missing:
        raise ValueError(f"{name} also needs {', '.join(missing)}")
    return kind(**values)
