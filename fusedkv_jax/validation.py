"""The one way in which dataclasses of settings are validated: types by annotation, bounds by name.

`validate` belongs into `__post_init__`, `build` makes a dataclass from plain values (JSON, YAML).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeGuard, TypeVar

T = TypeVar("T")
Hint = Any  # an annotation: a class, a union, a literal, a tuple
Bounds = Mapping[str, float]
NO_BOUNDS: Bounds = types.MappingProxyType({})


def validate(
    instance: object,
    error: type[ValueError],
    *,
    least: Bounds = NO_BOUNDS,
    most: Bounds = NO_BOUNDS,
    above: Bounds = NO_BOUNDS,
    prefix: str = "",
) -> None:
    """Refuse a field whose value is not of its annotated type, not finite, or out of bounds.

    Understood are bool, int, float (whole numbers included), str, None, classes, literals, unions
    of these, and tuples of them. A bool is no number.

    Args:
        instance: a dataclass.
        error: what is raised; its message names the field, the value and what to use.
        least: smallest value of numbers, by field.
        most: their largest value.
        above: what numbers must exceed.
        prefix: what the message puts before a field's name, such as `train.`.
    """
    for name, hint in _hints(type(instance)).items():
        value = getattr(instance, name)
        bound = _bound(least.get(name), most.get(name), above.get(name))
        advice = _advice(hint, value, bound)
        if advice is None and _is_number(value):
            inside = least.get(name, -math.inf) <= value <= most.get(name, math.inf)
            if not inside or value <= above.get(name, -math.inf):
                advice = f"use {_describe(hint, bound)}"
        if advice:
            raise error(f"{prefix}{name}={value!r}; {advice}")


def _bound(least: float | None, most: float | None, above: float | None) -> str:
    """What a message says of the values that a number may have."""
    if above is not None:
        return f" above {above}" + ("" if most is None else f" and up to {most}")
    if most is None:
        return "" if least is None else f" of at least {least}"
    return f" of at most {most}" if least is None else f" from {least} to {most}"


def check_count(
    name: str, value: object, error: type[ValueError] = ValueError, least: int = 1
) -> None:
    """Refuse what is not a whole number (NumPy's included) of at least `least`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < least:
        raise error(f"{name}={value!r}; use a whole number of at least {least}")


def check_kind(
    name: str, value: object, kind: type, remedy: str, error: type[ValueError] = ValueError
) -> None:
    """Refuse what is not an instance of a class; the message says what to pass instead."""
    if not isinstance(value, kind):
        raise error(f"{name} is {type(value).__name__}; pass {remedy}")


def check_type(name: str, value: object, hint: Hint, error: type[ValueError]) -> None:
    """Refuse a value that is not of an annotated type (see `validate`) or not finite."""
    advice = _advice(hint, value, "")
    if advice:
        raise error(f"{name}={value!r}; {advice}")


def build(
    cls: type[T], fields: Mapping[str, object], error: type[ValueError], prefix: str = ""
) -> T:
    """A dataclass from plain values.

    Args:
        cls: the dataclass.
        fields: values by name.
        error: raised for an unknown field, with the nearest names, and for a missing one.
        prefix: what the message puts before a field's name, such as `rope.`.
    """
    if not isinstance(fields, Mapping):
        raise error(f"{prefix.rstrip('.') or cls.__name__}={fields!r}; use fields by name")
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in fields:
        if name not in known:
            raise error(f"unknown field {prefix}{name}{nearest(name, known)}")
    for name, field in known.items():
        default = (field.default, field.default_factory)
        if name not in fields and default == (dataclasses.MISSING, dataclasses.MISSING):
            raise error(f"missing field {prefix}{name}")
    return cls(**fields)


def nearest_names(name: object, known: Iterable[str]) -> list[str]:
    """The known names that may have been meant, the likeliest first; at most three."""
    return difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)


def nearest(name: object, known: Iterable[str]) -> str:
    """The part of a message that names what may have been meant; empty if nothing is near."""
    near = nearest_names(name, known)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def nearest_or_all(name: object, known: Iterable[str]) -> str:
    """The same; where nothing is near, the part that names all there are."""
    known = list(known)
    return nearest(name, known) or f"; choose {', '.join(known) or 'none'}"


@functools.cache
def _hints(cls: type) -> dict[str, Hint]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _advice(hint: Hint, value: object, bound: str) -> str | None:
    """What to do about a value of the wrong type; None for a right one."""
    if _fits(hint, value):
        return None
    choices = [choice for part in alternatives(hint) for choice in _literals(part)]
    others = [part for part in alternatives(hint) if not _literals(part)]
    if choices and not others:
        return "choose " + ", ".join(map(str, choices))
    return "use " + _describe(hint, bound)


def _fits(hint: Hint, value: object) -> bool:
    if len(alternatives(hint)) > 1:
        return any(_fits(part, value) for part in alternatives(hint))
    if _literals(hint):
        return any(type(value) is type(choice) and value == choice for choice in _literals(hint))
    if typing.get_origin(hint) is tuple:
        return type(value) is tuple and _fit_all(typing.get_args(hint), value)
    if hint is Any:
        return True
    if hint is float:
        return _is_number(value) and math.isfinite(value)
    if hint in (int, bool, str):
        return type(value) is hint
    return isinstance(value, typing.get_origin(hint) or hint)


def _is_number(value: object) -> TypeGuard[int | float]:
    """An int or a float, of which NumPy's float64 is one; a bool is neither."""
    return type(value) is int or isinstance(value, float)


def _fit_all(hints: tuple[Hint, ...], values: tuple[object, ...]) -> bool:
    if hints[-1:] == (...,):
        hints = (hints[0],) * len(values)
    return len(hints) == len(values) and all(map(_fits, hints, values))


_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("True or False", "True or False"),
    type(None): ("None", "None"),
}


def _describe(hint: Hint, bound: str = "", many: bool = False) -> str:
    if len(alternatives(hint)) > 1:
        *others, last = (_describe(part, bound) for part in alternatives(hint))
        return f"{', '.join(others)} or {last}"
    if _literals(hint):
        return ", ".join(map(str, _literals(hint)))
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        size = "" if inner[-1:] == (...,) else f"{len(inner)} "
        return f"a tuple of {size}{_describe(inner[0], many=True)}"
    one, several = _WORDS.get(hint) or (f"a {hint.__name__}", f"{hint.__name__}s")
    return (several if many else one) + (bound if hint in (int, float) else "")


def alternatives(hint: Hint) -> tuple[Hint, ...]:
    """The members of a union; of anything else, itself."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def _literals(hint: Hint) -> tuple[Hint, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
