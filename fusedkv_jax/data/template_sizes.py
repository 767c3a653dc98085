"""How long the results of a template's filters and methods would be, before they are computed."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized

MAX_LENGTH = 10_000_000  # of any text or list on the way, and of the result
_MAX_DIGITS = 4  # of the width of a field in a format
_MAX_INDENT = 100
_MAX_PRECISION = 100

_PERCENT_FIELD = re.compile(r"%(?:\([^)]*\))?([^a-zA-Z%]*)[a-zA-Z%]")


class TooLong(ValueError):
    """A text or a list would be longer than `MAX_LENGTH`."""


def length(value: object) -> int:
    """The length of a value as text, about; containers count with all that they hold.

    Raises:
        TooLong: it is more than `MAX_LENGTH`; containers that share parts grow very fast.
    """
    left: list[object] = [value]
    total = 0
    while left:
        each = left.pop()
        total += len(each) if isinstance(each, (str, bytes)) else 1
        if isinstance(each, Mapping):
            left += [*each.keys(), *each.values()]
        elif isinstance(each, (list, tuple, set, frozenset)):
            left += each
        if total + len(left) > MAX_LENGTH:
            raise TooLong(f"a text is longer than {MAX_LENGTH:,}")
    return total


def percent_format(text: object, arguments: object) -> int:
    """The length of `text % arguments`."""
    return _of_fields([field[1] for field in _PERCENT_FIELD.finditer(str(text))], text, arguments)


def brace_format(text: object, arguments: object) -> int:
    """The length of `text.format(...)`."""
    specs = [spec or "" for _, field, spec, _ in string.Formatter().parse(str(text)) if field]
    specs += re.findall(r"\{(:[^}]*)?\}", str(text))
    return _of_fields(specs, text, arguments)


def _of_fields(specs: list[str], text: object, arguments: object) -> int:
    numbers = re.findall(r"\d+", " ".join(specs))
    if any(len(n) > _MAX_DIGITS for n in numbers) or any(re.search(r"[*{]", s) for s in specs):
        raise TooLong("a field of a format is too wide")
    return len(str(text)) + sum(map(int, numbers)) + len(specs) * length(arguments)


def _padded(value: object, width: int = 80, *_: object) -> int:
    return max(length(value), width)


def _replaced(value: object, old: object, new: object, count: int | None = None) -> int:
    return length(value) + str(value).count(str(old)) * length(new)


def _indented(value: object, width: int | str = 4, first: bool = False, blank: bool = False) -> int:
    step = len(width) if isinstance(width, str) else width
    return length(value) + (len(str(value).splitlines()) + 1) * step


def _wrapped(
    value: object,
    width: int = 79,
    break_long_words: bool = True,
    wrapstring: object = None,
    **_: object,
) -> int:
    text = str(value)
    lines = min(len(text), 2 * len(text) // max(width, 1) + text.count("\n") + 1)
    return len(text) + lines * length(wrapstring or "\n")


def _joined(values: Sized, d: object = "", attribute: object = None) -> int:
    return length(values) + len(values) * length(d)


def _batched(values: object, linecount: int, fill_with: object = None) -> int:
    return length(values) + linecount * length(fill_with)


def _rounded(value: object, precision: int = 0, method: object = None) -> int:
    if abs(precision) > _MAX_PRECISION:
        raise TooLong(f"precision {precision} is too large")
    return 0


def _as_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> int:
    if (len(indent) if isinstance(indent, str) else indent or 0) > _MAX_INDENT:
        raise TooLong(f"indent {indent} is too large")
    return length(value) * max(1, *(len(text) for text in separators or ", "))


def _summed(values: Iterable[object], attribute: object = None, start: object = 0) -> int:
    if not isinstance(start, (int, float)):
        raise TooLong("a sum of lists or texts can be too long; use a loop")
    return 0


def _refused(*_: object, **__: object) -> int:
    raise TooLong("to_bytes and translate are not for templates")


def _only_value(value: object, *_: object, **__: object) -> int:
    return length(value)


# The sizes of the results of Jinja's filters; their parameters have Jinja's names. Those that are
# not here give no more than they get, or some parts of it.
FILTERS: dict[str, Callable[..., int]] = {
    "batch": _batched,
    "center": _padded,
    "format": lambda value, *args, **kwargs: percent_format(value, kwargs or args),
    "indent": _indented,
    "join": _joined,
    "pprint": _only_value,
    "replace": _replaced,
    "round": _rounded,
    "slice": lambda values, slices, fill_with=None: _batched(values, slices, fill_with),
    "string": _only_value,
    "sum": _summed,
    "tojson": _as_json,
    "wordwrap": _wrapped,
}

# The same of the methods of texts and numbers, the object first.
METHODS: dict[str, Callable[..., int]] = {
    "center": _padded,
    "expandtabs": lambda text, tabsize=8: len(text) + text.count("\t") * tabsize,
    "join": lambda text, values: _joined(values, text),
    "ljust": _padded,
    "replace": _replaced,
    "rjust": _padded,
    "to_bytes": _refused,
    "translate": _refused,
    "zfill": _padded,
}
