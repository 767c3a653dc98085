"""How long the results of a template's filters and methods would be, before they are computed."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized, ValuesView

from jinja2.utils import Namespace

MAX_LENGTH = 10_000_000  # of any text or list on the way, and of the result
ITEM = 10  # characters that an item of a list counts as, beside its own
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
        total += size(each) if isinstance(each, (str, bytes)) else ITEM
        if isinstance(each, int):
            total += each.bit_length() // 3  # digits
        elif isinstance(each, Mapping):
            left += [*each.keys(), *each.values()]
        elif isinstance(each, Namespace):
            left.append(object.__getattribute__(each, "_Namespace__attrs"))
        elif isinstance(each, (list, tuple, Set, ValuesView)):
            left += each
        if total + ITEM * len(left) > MAX_LENGTH:
            raise TooLong(f"a text is longer than {MAX_LENGTH:,}")
    return total


def size(value: object = None) -> int:
    """Characters of a text, or those that the items of a list count as, whatever they hold."""
    if isinstance(value, (str, bytes)):
        return len(value)
    return ITEM * len(value) if isinstance(value, Sized) else 1


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


def whole(*values: object, **named: object) -> int:
    """All that is given is read to its end, which takes exponential time where parts are shared."""
    return sum(map(length, values)) + sum(map(length, named.values()))


def _outer(values: object = None, *rest: object, **named: object) -> int:
    return size(values) + whole(*rest, **named)


def _as_list(value: object = None) -> int:
    return ITEM * len(value) if isinstance(value, str) else size(value)


def _split(text: str | bytes, sep: str | bytes | None = None, maxsplit: int = -1) -> int:
    spaces = " \t\n\r" if isinstance(text, str) else (b" ", b"\t", b"\n", b"\r")
    pieces = sum(text.count(each) for each in ([sep] if sep else spaces))  # type: ignore[arg-type]
    return len(text) + ITEM * (1 + (pieces if maxsplit < 0 else min(pieces, maxsplit)))


# The sizes of the results of Jinja's filters, or of what they read if that is more; parameters have
# Jinja's names. Filters that are not here read all that they get and give no more.
FILTERS: dict[str, Callable[..., int]] = {
    "batch": _batched,
    "center": _padded,
    "format": lambda value, *args, **kwargs: percent_format(value, kwargs or args),
    "indent": _indented,
    "join": _joined,
    "replace": _replaced,
    "round": _rounded,
    "slice": lambda values, slices, fill_with=None: _batched(values, slices, fill_with),
    "sum": _summed,
    "tojson": _as_json,
    "wordwrap": _wrapped,
    "list": _as_list,
    # What items hold is not read.
    **dict.fromkeys(
        ("attr", "count", "d", "default", "first", "items", "last", "length", "map", "random"),
        _outer,
    ),
    **dict.fromkeys(("reject", "rejectattr", "reverse", "select", "selectattr"), _outer),
}

# The same of the methods of texts and numbers, the object first.
METHODS: dict[str, Callable[..., int]] = {
    "center": _padded,
    "expandtabs": lambda text, tabsize=8: len(text) + text.count("\t") * tabsize,
    "join": lambda text, values: _joined(values, text),
    "ljust": _padded,
    "replace": _replaced,
    "rjust": _padded,
    "rsplit": _split,
    "split": _split,
    "splitlines": lambda text, keepends=False: len(text) + ITEM * text.count("\n"),
    "to_bytes": _refused,
    "translate": _refused,
    "zfill": _padded,
}
