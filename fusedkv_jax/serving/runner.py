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
from fusedkv_jax.serving.copies import Copy, Direction
from fusedkv_jax.serving.draws import DrawArrays, Draws, TokenDraw, draw_tokens
from fusedkv_jax.serving.plan import StepPlan
from fusedkv_jax.serving.scoring import PromptChunk, no_tokens, run_scored, scored_chunks
from fusedkv_jax.serving.settings import ServingSettings

COPIES = 8  # pages that one program copies
FORKS = 8  # tokens that one program draws from one row of logits


class Drawn(NamedTuple):
    """A token, and log-probabilities of it and of the likeliest ones: arrays of one place."""

    token: int
    logprobs: Logprobs


class PromptScores(NamedTuple):
    """Log-probabilities of tokens of a prompt, from position `start` on: arrays of their places."""

    start: int
    logprobs: Logprobs


class StepResult(NamedTuple):
    """What a step has given.

    Attributes:
        drawn: for each request of the plan what was drawn, None where nothing was.
        scores: those of prompts that are scored, by the request's place in the plan.
    """

    drawn: list[Drawn | None]
    scores: dict[int, list[PromptScores]]


class _Saved(NamedTuple):
    """Pages on the device, taken out of the pool, and their places in host memory."""

    targets: list[int]
    pages: PagedStore


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
        settings: sizes of steps and pages, and how many likeliest tokens are told of each place.
        num_pages: pages of the pool.
        max_model_len: tokens that a request can come to.
        mask_words: 32-bit words of a mask of the vocabulary.

    Attributes:
        lower_rows, upper_rows: tokens that have passed through the layers that cache something,
            and through those above.
    """

    def __init__(
        self,
        model: Decoder,
        settings: ServingSettings,
        *,
        num_pages: int,
        max_model_len: int,
        mask_words: int,
    ):
        programs = GenerationPrograms.of(model)
        self.config, self.shapes = programs.model.config, settings.make_shapes()
        self._split = programs.split
        self._settings, self._num_pages = settings, num_pages
        self._width = -(-max_model_len // settings.page_size)
        self._draws = DrawArrays(max_model_len, mask_words)
        self._k = min(settings.max_logprobs, self.config.vocab_size)
        self._logits: Any = None
        self.lower_rows = self.upper_rows = 0
        self.reset()
        self._host = self._host_pages(settings.host_pages)

    def run(self, plan: StepPlan, draws: Sequence[TokenDraw | None]) -> StepResult:
        """Compute a plan.

        Args:
            plan: what to compute; its copies come first.
            draws: how the next token of each of its requests is drawn.
        """
        saved = self._carry_out(plan.copies)
        try:
            return self._run(plan, draws)
        finally:  # beside the step, which has been sent off; after one that fails as well
            for pages in saved:
                self._put_down(pages)

    def _run(self, plan: StepPlan, draws: Sequence[TokenDraw | None]) -> StepResult:
        scores = self._score(plan)
        arrays = step_arrays(plan, self.shapes, self._width, scores)
        wanted = [draws[place] for place in arrays.rows]
        assert all(draw is not None for draw in wanted)
        size = len(arrays.sampled)
        if len(scores) < len(plan.requests) or wanted:
            self._logits, self.pool = run_step(*self._split, self._donated(), *arrays[:3])
        self.lower_rows += plan.tokens
        self.upper_rows += len(wanted)
        results: list[Drawn | None] = [None] * len(plan.requests)
        if wanted:
            made = self._draws.make(wanted, size)  # type: ignore[arg-type]
            found = jax.device_get(_draw(self._logits, made, k=self._k))
            for row, place in enumerate(arrays.rows):
                results[place] = _row(found, row)
        return StepResult(results, scores)

    def _score(self, plan: StepPlan) -> dict[int, list[PromptScores]]:
        """Run the tokens of prompts that are scored through all layers."""
        found: dict[int, list[tuple[PromptChunk, Logprobs]]] = {}
        for chunk in scored_chunks(plan, self.shapes.chunk, self._width):
            scores, self.pool = run_scored(*self._split, self._donated(), chunk.arrays, k=self._k)
            found.setdefault(chunk.place, []).append((chunk, scores))
            self.upper_rows += chunk.count
        return {
            place: [
                PromptScores(chunk.start, jax.tree.map(lambda x, n=chunk.count: x[:n], scores))
                for chunk, scores in jax.device_get(members)
            ]
            for place, members in found.items()
        }

    def _donated(self) -> PagedStore:
        """The pool, for a program that takes it and gives it back."""
        pool = self.pool
        del self.pool
        return pool

    def fork(self, row: int, draws: Sequence[TokenDraw]) -> list[Drawn]:
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
        pool = getattr(self, "pool", None)
        return pool is None or any(x.is_deleted() for x in jax.tree.leaves(pool))

    def reset(self) -> None:
        """An empty pool, for example where a step that failed has used up the old one."""
        self.pool = PagedStore.create(
            self.config,
            num_pages=self._num_pages,
            page_size=self._settings.page_size,
            dtype=self._settings.cache_dtype,
        )

    def warm_up(self) -> int:
        """Compile the programs of all shapes; the number of shapes."""
        for rows, chunk_rows in self.shapes.all():
            arrays = empty_arrays(rows, chunk_rows, self.shapes.chunk, self._width)
            logits, self.pool = run_step(*self._split, self.pool, *arrays[:3])
            if rows:
                _draw(logits, self._draws.make([], rows), k=self._k)
                draw_more(logits, np.int32(0), self._draws.make([], FORKS), k=self._k)
        nobody = no_tokens(self.shapes.chunk, self._width)
        _, self.pool = run_scored(*self._split, self._donated(), nobody, k=self._k)
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

    def _carry_out(self, copies: Sequence[Copy]) -> list[_Saved]:
        """Copy pages, in order: runs of one direction, a few pages at a time.

        Returns:
            Pages that are to be put into host memory when the step runs.
        """
        saved: list[_Saved] = []
        for direction, run in itertools.groupby(copies, lambda copy: copy.direction):
            members = list(run)
            for start in range(0, len(members), COPIES):
                part = members[start : start + COPIES]
                sources, targets = [c.source for c in part], [c.target for c in part]
                if direction is Direction.WITHIN:
                    pages = _padded(sources, 0), _padded(targets, 0)
                    self.pool = _copy(self.pool, *pages, np.int32(len(sources)))
                elif direction in (Direction.INTO, Direction.AHEAD):
                    pages = jax.tree.map(lambda held, s=sources: held[:, _padded(s, 0)], self._host)
                    self.pool = _put(self.pool, _padded(targets, self._num_pages), pages)
                else:
                    taken = _Saved(targets, _take(self.pool, _padded(sources, 0)))
                    if direction is Direction.BEHIND:
                        saved.append(taken)
                    else:  # a later copy may read it again
                        self._put_down(taken)
        return saved

    def _put_down(self, saved: _Saved) -> None:
        """Put pages from the device into host memory."""
        targets, pages = saved.targets, jax.device_get(saved.pages)
        for held, new in zip(*map(jax.tree.leaves, (self._host, pages)), strict=True):
            held[:, targets] = new[:, : len(targets)]


def _padded(pages: Sequence[int], value: int) -> np.ndarray:
    return np.array([*pages, *[value] * (COPIES - len(pages))], np.int32)


def _row(found: tuple[np.ndarray, Logprobs], row: int) -> Drawn:
    tokens, logprobs = found
    return Drawn(int(tokens[row]), jax.tree.map(lambda x: x[row : row + 1], logprobs))
