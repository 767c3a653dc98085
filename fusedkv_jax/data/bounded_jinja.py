"""Jinja's immutable sandbox with bounds: a template that would not end, or not fit, is refused.

The sandbox keeps a template from the outside, and lets it count to infinity inside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.utils import Namespace

from fusedkv_jax.data import template_sizes
from fusedkv_jax.data.template_sizes import MAX_LENGTH, TooLong

MAX_ROUNDS = 500_000  # of all loops of one rendering; a call counts as several
CALL_ROUNDS = 10
CHARACTERS_OF_A_ROUND = 1_000  # that a filter or a method reads or writes
MAX_BITS = 10_000  # of a whole number on the way
COMPARING = "eq == equalto ne != in lt < lessthan le <= gt > greaterthan ge >=".split()  # tests


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, by which templates of the hub say what the
    assistant wrote: the text within, as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Renders one template at a time."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, filters: Mapping[str, Callable[..., object]] | None = None) -> None:
        """Jinja's filters, and others in addition to them or in their place."""
        self._rounds = 0
        # Set as templates on the Hugging Face hub expect it.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _Generation],
            finalize=self._read,
        )
        every = self.filters | dict(filters or {})
        self.filters = {name: self._bounded(name, each) for name, each in every.items()}
        self.filters["counted"] = self._counted
        self.filters["read"] = self._read
        self.filters["sized"] = self._sized
        self.filters["written"] = self._written
        for name in COMPARING:
            self.tests[name] = self._comparing(self.tests[name])
        del self.globals["lipsum"]

    def render(self, template: jinja2.Template, variables: dict[str, object]) -> str:
        """The text of a template.

        Raises:
            jinja2.TemplateError: its loops and calls do not end.
            TooLong: a text or a number on the way, or the result, is too long.
        """
        self._rounds = 0
        pieces, length = [], 0
        for piece in template.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_LENGTH:
                raise TooLong(f"its text is longer than {MAX_LENGTH:,}")
        return "".join(pieces)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None)
        for joined in tree.find_all(nodes.Concat):
            joined.nodes = [_filtered(each, "read") for each in joined.nodes]
        for compared in tree.find_all(nodes.Compare):
            for holder in (compared, *compared.ops):
                holder.expr = _filtered(holder.expr, "read")
        for pair in tree.find_all(nodes.Pair):  # whose key is hashed
            pair.key = _filtered(pair.key, "read")
        for part in tree.find_all(nodes.Getitem):
            if isinstance(part.arg, nodes.Slice):
                part.node = _filtered(part.node, "sized")
        for output in tree.find_all(nodes.Output):  # which a block may keep, again and again
            output.nodes = [_long_data(each) for each in output.nodes]
        return tree

    def _count(self, rounds: int) -> None:
        self._rounds += rounds
        if self._rounds > MAX_ROUNDS:
            raise jinja2.TemplateRuntimeError(f"more than {MAX_ROUNDS:,} rounds of loops and calls")

    def _counted(self, items: Iterable[object]) -> list[object]:
        found = list(items)
        self._count(1 + len(found))
        return found

    def _count_size(self, size: int) -> None:
        if size > MAX_LENGTH:
            raise TooLong(f"a text is longer than {MAX_LENGTH:,}")
        self._count(size // CHARACTERS_OF_A_ROUND)

    def _read(self, value: object) -> object:
        """A value that is written, compared or hashed with all that it holds."""
        self._count_size(template_sizes.length(value))
        return value

    def _sized(self, value: object) -> object:
        """A value of which a part is copied."""
        self._count_size(template_sizes.size(value))
        return value

    @jinja2.pass_context  # so that it is not done once, when the template is compiled
    def _written(self, context: Context, text: str) -> str:
        self._count(len(text) // CHARACTERS_OF_A_ROUND)
        return text

    def _comparing(self, test: Callable[..., bool]) -> Callable[..., bool]:
        def bounded(*args: object) -> bool:
            return test(*map(self._read, args))

        return bounded

    def _bounded(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        """A filter whose result is known to fit before it is computed."""
        skipped = int(hasattr(function, "jinja_pass_arg"))  # the environment or the context
        size_of = template_sizes.FILTERS.get(name, template_sizes.whole)

        @functools.wraps(function)
        def bounded(*args: object, **kwargs: object) -> object:
            context, rest = args[:skipped], list(args[skipped:])
            if rest and isinstance(rest[0], Iterator):
                rest[0] = self._counted(rest[0])
            self._count_size(size_of(*rest, **kwargs))
            return function(*context, *rest, **kwargs)

        return bounded

    def call(self, context: Context, called: object, /, *args: object, **kwargs: object) -> object:
        self._count(CALL_ROUNDS)
        owner = getattr(called, "__self__", None)
        given = {n: kwargs[n] for n in kwargs if n not in ("_loop_vars", "_block_vars")}  # Jinja's
        if isinstance(called, LoopContext):
            args = tuple(map(self._counted, args))  # pyright: ignore[reportArgumentType]
        elif isinstance(owner, (str, bytes, int)):
            args = tuple(self._counted(a) if isinstance(a, Iterator) else a for a in args)
            size_of = template_sizes.METHODS.get(
                getattr(called, "__name__", ""), template_sizes.whole
            )
            self._count_size(size_of(owner, *args, **given))
        elif not isinstance(called, Macro) and called is not Namespace:
            owners = (owner,) if isinstance(owner, (list, tuple)) else ()
            self._count_size(template_sizes.whole(*owners, *args, **given))
        return super().call(context, called, *args, **kwargs)

    def getitem(self, obj: object, argument: object) -> object:
        if isinstance(argument, (tuple, list, dict)):  # hashed, or named in an error
            self._read(argument)
        return super().getitem(obj, argument)  # pyright: ignore[reportArgumentType]

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: object, **kwargs: object) -> str:
            self._count_size(
                template_sizes.brace_format(getattr(value, "__self__", ""), [args, kwargs])
            )
            return wrapped(*args, **kwargs)

        return bounded

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(operator, left, right)
        elif operator == "%":
            if isinstance(left, str):
                self._count_size(template_sizes.percent_format(left, right))
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(text, Sized):
                    size = template_sizes.size(text) * max(times, 0)
                    if size > MAX_LENGTH:
                        raise TooLong(f"a product is longer than {MAX_LENGTH:,}")
                    self._count_size(size)
        elif operator == "+":
            self._count_size(template_sizes.size(left) + template_sizes.size(right))
        return super().call_binop(context, operator, left, right)


def _check_bits(operator: str, left: int, right: int) -> None:
    """Whole numbers grow without end by powers and products."""
    if operator == "**" and left.bit_length() * abs(right) > MAX_BITS:
        raise TooLong(f"the exponent {right} is too large")
    if operator == "*" and left.bit_length() + right.bit_length() > MAX_BITS:
        raise TooLong("a product of numbers is too large")


def _filtered(value: nodes.Expr, name: str) -> nodes.Expr:
    if isinstance(value, nodes.Const):
        return value
    return nodes.Filter(value, name, [], [], None, None)


def _long_data(part: nodes.Expr) -> nodes.Expr:
    if not isinstance(part, nodes.TemplateData) or len(part.data) < CHARACTERS_OF_A_ROUND:
        return part
    text = nodes.MarkSafeIfAutoescape(nodes.Const(part.data))
    return nodes.Filter(text, "written", [], [], None, None)
