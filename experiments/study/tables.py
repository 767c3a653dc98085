"""The reports' tables: Markdown, with means and differences and their intervals."""

from collections.abc import Collection, Sequence

from experiments.study.statistics import Estimate


def markdown(
    head: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[int] = (0,)
) -> list[str]:
    """The lines of a table; shorter rows end with empty cells.

    Args:
      head, rows: cells.
      words: columns that are aligned to the left; those of numbers are to the right.
    """
    ruler = ["---" if column in words else "---:" for column in range(len(head))]
    filled = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (head, ruler, *filled)]


def mean(estimate: Estimate, digits: int = 4) -> str:
    """A mean, and half of its interval if it has one."""
    return f"{estimate.mean:.{digits}f}{_spread(estimate, digits)}"


def difference(estimate: Estimate | None, digits: int = 4) -> str:
    """A difference with its sign and half of its interval, bold where that excludes zero."""
    if estimate is None:
        return ""
    text = f"{estimate.mean:+.{digits}f}{_spread(estimate, digits)}"
    return f"**{text}**" if estimate.excludes_zero else text


def _spread(estimate: Estimate, digits: int) -> str:
    return "" if estimate.half_width is None else f" ± {estimate.half_width:.{digits}f}"
