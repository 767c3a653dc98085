"""Runs planned steps on the device: the pool of pages, its copies, and the step program."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fusedkv_jax.cache import Lane, PagedCall, PagedStore, copy_pages, put_pages, take_pages
from fusedkv_jax.generation.logprobs import Logprobs
from fusedkv_jax.generation.programs import GenerationPrograms
from fusedkv_jax.model import Decoder
from fusedkv_jax.model.paging import extend_pages
from fusedkv_jax.serving.arrays import empty_arrays, step_arrays
from fusedkv_jax.serving.draws import Draw, DrawArrays, Draws, draw_tokens
from fusedkv_jax.serving.memory import Copy, Direction
from fusedkv_jax.serving.plan import StepPlan
from fusedkv_jax.serving.shapes import StepShapes

COPIES = 8  # pages that one program copies
FORKS = 8  # tokens that one program draws from one row of logits


class Drawn(NamedTuple):
    """A token, and log-probabilities of it and of the likeliest ones: arrays of one place."""

    token: int
    logprobs: Logprobs


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="pool")
def run_step(
    graph: nnx.GraphDef[Decoder],
    params: Any,
    pool: PagedStore,
    tokens: Int[Array, "N"],
    lanes: tuple[Lane, ...],
    sampled: Int[Array, "S"],
) -> tuple[Any, PagedStore]:
    """The step program: `extend_pages`. Tokens are drawn by another, which has fewer shapes."""
    return extend_pages(nnx.merge(graph, params), tokens, PagedCall.of(lanes), pool, sampled)


_draw = jax.jit(draw_tokens, static_argnames="k")


@functools.partial(jax.jit, static_argnames="k")
def draw_more(logits: Float[Array, "S V"], row: Int[Array, ""], draws: Draws, k: int) -> Any:
    """Further tokens from one row of the logits."""
    size = draws.lengths.shape[0]
    return draw_tokens(jnp.broadcast_to(logits[row], (size, logits.shape[1])), draws, k)


_copy = jax.jit(copy_pages, donate_argnums=0)
_take = jax.jit(take_pages)
_put = jax.jit(put_pages, donate_argnums=0)


class Runner:
    """A model, its pool of pages, and the programs over both.

    Args:
        model: the model.
        shapes: of its steps.
        num_pages: pages of the pool.
        page_size: tokens of a page.
        host_pages: pages in host memory.
        cache_dtype: storage type of the pages; None for the model's.
        max_model_len: tokens that a request can come to.
        max_logprobs: likeliest tokens that are told of each place.

    Attributes:
        lower_rows, upper_rows: tokens that have passed through the layers that cache something,
            and through those above.
    """

    def __init__(
        self,
        model: Decoder,
        shapes: StepShapes,
        *,
        num_pages: int,
        page_size: int,
        host_pages: int,
        cache_dtype: str | None,
        max_model_len: int,
        max_logprobs: int,
    ):
        programs = GenerationPrograms.of(model)
        self.config, self.shapes = programs.model.config, shapes
        self._split = programs.split
        self._sizes: dict[str, Any] = {"page_size": page_size, "dtype": cache_dtype}
        self._num_pages = num_pages
        self._width = -(-max_model_len // page_size)
        self._draws = DrawArrays(max_model_len)
        self._k = min(max_logprobs, self.config.vocab_size)
        self._logits: Any = None
        self.lower_rows = self.upper_rows = 0
        self.pool = PagedStore.create(self.config, num_pages=num_pages, **self._sizes)
        self._host = self._host_pages(host_pages)

    def run(self, plan: StepPlan, draws: Sequence[Draw | None]) -> list[Drawn | None]:
        """Compute a plan.

        Args:
            plan: what to compute; its copies come first.
            draws: how the next token of each of its requests is drawn.

        Returns:
            For each request what was drawn, None where nothing was.
        """
        self._carry_out(plan.copies)
        arrays = step_arrays(plan, self.shapes, self._width)
        wanted = [draws[place] for place in arrays.rows]
        assert all(draw is not None for draw in wanted)
        size = len(arrays.sampled)
        pool, self.pool = self.pool, None  # type: ignore[assignment]  # it is donated
        self._logits, self.pool = run_step(*self._split, pool, *arrays[:3])
        self.lower_rows += plan.tokens
        self.upper_rows += len(wanted)
        results: list[Drawn | None] = [None] * len(plan.requests)
        if wanted:
            made = self._draws.make(wanted, size)  # type: ignore[arg-type]
            found = jax.device_get(_draw(self._logits, made, k=self._k))
            for row, place in enumerate(arrays.rows):
                results[place] = _row(found, row)
        return results

    def fork(self, row: int, draws: Sequence[Draw]) -> list[Drawn]:
        """Further tokens from the logits of a row of the last step.

        Args:
            row: its number among the rows that were sampled.
            draws: how they are drawn.
        """
        results = []
        for start in range(0, len(draws), FORKS):
            part = draws[start : start + FORKS]
            made = self._draws.make(part, FORKS)
            found = jax.device_get(draw_more(self._logits, np.int32(row), made, k=self._k))
            results += [_row(found, i) for i in range(len(part))]
        return results

    @property
    def lost(self) -> bool:
        """A step that failed has used up the pool."""
        return self.pool is None or any(x.is_deleted() for x in jax.tree.leaves(self.pool))

    def reset(self) -> None:
        """An empty pool, where a step that failed has used up the old one."""
        self.pool = PagedStore.create(self.config, num_pages=self._num_pages, **self._sizes)

    def warm_up(self) -> int:
        """Compile the programs of all shapes; the number of shapes."""
        for rows, chunk_rows in self.shapes.all():
            arrays = empty_arrays(rows, chunk_rows, self.shapes.chunk, self._width)
            logits, self.pool = run_step(*self._split, self.pool, *arrays[:3])
            if rows:
                _draw(logits, self._draws.make([], rows), k=self._k)
                draw_more(logits, np.int32(0), self._draws.make([], FORKS), k=self._k)
        nowhere = np.full(COPIES, self._num_pages, np.int32)
        self.pool = _copy(self.pool, nowhere * 0, nowhere * 0, np.int32(0))
        if self._host is not None:
            self.pool = _put(self.pool, nowhere, _take(self.pool, nowhere * 0))
        return len(self.shapes.all())

    def _host_pages(self, count: int) -> Any:
        """Arrays in host memory for so many pages of each stream; None for none."""
        if not count:
            return None
        return jax.tree.map(
            lambda x: np.zeros((x.shape[0], count, *x.shape[2:]), x.dtype), self.pool
        )

    def _carry_out(self, copies: Sequence[Copy]) -> None:
        """Copy pages, in order: runs of one direction, a few pages at a time."""
        into = {Direction.INTO, Direction.AHEAD}
        for direction, run in itertools.groupby(
            copies, lambda c: Direction.INTO if c.direction in into else c.direction
        ):
            members = list(run)
            for start in range(0, len(members), COPIES):
                part = members[start : start + COPIES]
                self._copy_part(direction, [c.source for c in part], [c.target for c in part])

    def _copy_part(self, direction: Direction, sources: list[int], targets: list[int]) -> None:
        count = len(sources)
        if direction is Direction.WITHIN:
            pages = _padded(sources, 0), _padded(targets, 0)
            self.pool = _copy(self.pool, *pages, np.int32(count))
        elif direction is Direction.OUT:
            found = jax.device_get(_take(self.pool, _padded(sources, 0)))
            for held, pages in zip(*map(jax.tree.leaves, (self._host, found)), strict=True):
                held[:, targets] = pages[:, :count]
        else:
            pages = jax.tree.map(lambda held: held[:, _padded(sources, 0)], self._host)
            self.pool = _put(self.pool, _padded(targets, self._num_pages), pages)


def _padded(pages: Sequence[int], value: int) -> np.ndarray:
    return np.array([*pages, *[value] * (COPIES - len(pages))], np.int32)


def _row(found: tuple[np.ndarray, Logprobs], row: int) -> Drawn:
    tokens, logprobs = found
    return Drawn(int(tokens[row]), jax.tree.map(lambda x: x[row : row + 1], logprobs))
