"""Pages of the documentation with a part that a program writes, between two marks."""

import json
import pathlib
from typing import TypeVar

Marks = tuple[str, str]  # the line before the part and the line after it, each with its line end
_Results = TypeVar("_Results")


def read_results(path: pathlib.Path, none: _Results) -> _Results:
    """What a results file holds, or `none` if there is no file.

    Raises:
      ValueError: it is not JSON, or JSON of another kind than `none`.
    """
    if not path.exists():
        return none
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--results={path} is not JSON: {error}") from None
    if not isinstance(results, type(none)):
        kind = "an object" if isinstance(none, dict) else "a list"
        raise ValueError(f"--results={path} does not hold {kind}; name another file")
    return results


def check_marks(page: pathlib.Path, marks: Marks) -> None:
    """Refuse a page in which the part does not lie between its marks: before the work, not after.

    Raises:
      ValueError: a mark is not there, is there twice, or they are in the wrong order.
      OSError: the page cannot be read.
    """
    _around(page, marks)


def replace_part(page: pathlib.Path, marks: Marks, text: str) -> None:
    """Write `text` between the marks, in place of what was there; all else stays.

    Raises:
      ValueError: as `check_marks`; nothing is written then.
      OSError: the page cannot be read or written.
    """
    before, after = _around(page, marks)
    page.write_text(before + marks[0] + "\n" + text + "\n" + marks[1] + after)


def _around(page: pathlib.Path, marks: Marks) -> tuple[str, str]:
    """What is before the first mark, and after the second."""
    text = page.read_text()
    before, first, rest = text.partition(marks[0])
    _, second, after = rest.partition(marks[1])
    once = all(text.count(mark) == 1 for mark in marks)
    if not (first and second and once):
        start, end = (mark.strip() for mark in marks)
        raise ValueError(
            f"--document={page} needs one line {start!r} and, after it, one line {end!r}"
        )
    return before, after
