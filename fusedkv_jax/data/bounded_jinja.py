"""Jinja's immutable sandbox with bounds: a template that would not end, or not fit, is refused.

The sandbox keeps a template from the outside, and lets it count to infinity inside.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

MAX_ROUNDS = 500_000  # of all loops of one rendering; a call counts as several
CALL_ROUNDS = 10
MAX_LENGTH = 10_000_000  # of any text or list on the way, and of the result
MAX_EXPONENT = 1_000


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Renders one template at a time."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        # Set as templates on the Hugging Face hub expect it.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
        self._rounds = 0
        self.filters["counted"] = self._counted
        self.filters["fitting"] = _fitting

    def render(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """The text of a template.

        Raises:
            jinja2.TemplateError: its loops and calls do not end, or its text is too long.
        """
        self._rounds = 0
        pieces, length = [], 0
        for piece in template.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_LENGTH:
                raise jinja2.TemplateRuntimeError(f"its text is longer than {MAX_LENGTH:,}")
        return "".join(pieces)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None)
        for joined in tree.find_all(nodes.Concat):
            joined.nodes = [nodes.Filter(n, "fitting", [], [], None, None) for n in joined.nodes]
        return tree

    def _count(self, rounds: int) -> None:
        self._rounds += rounds
        if self._rounds > MAX_ROUNDS:
            raise jinja2.TemplateRuntimeError(f"more than {MAX_ROUNDS:,} rounds of loops and calls")

    def _counted(self, items: Iterable[Any]) -> list[Any]:
        found = list(items)
        self._count(1 + len(found))
        return found

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._count(CALL_ROUNDS)
        return super().call(context, called, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            if isinstance(right, int) and abs(right) > MAX_EXPONENT:
                raise jinja2.TemplateRuntimeError(f"exponent {right} is too large")
        elif operator == "%":
            if isinstance(left, str) and re.search(r"%[^a-zA-Z]*(\d{5}|\*)", left):
                raise jinja2.TemplateRuntimeError("a field of a format is too wide")
        elif operator == "*":
            sized = [hasattr(x, "__len__") for x in (left, right)]
            sizes = [len(x) if has else x for x, has in zip((left, right), sized, strict=True)]
            if any(sized) and sizes[0] * sizes[1] > MAX_LENGTH:
                raise jinja2.TemplateRuntimeError(f"a product is longer than {MAX_LENGTH:,}")
        else:
            _fitting(left)
        return super().call_binop(context, operator, left, right)


def _fitting(value: Any) -> Any:
    if hasattr(value, "__len__") and len(value) > MAX_LENGTH:
        raise jinja2.TemplateRuntimeError(f"a text is longer than {MAX_LENGTH:,}")
    return value
