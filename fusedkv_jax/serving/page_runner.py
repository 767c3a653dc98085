"""Runs planned steps over pages: one pool, its copies, and the step program."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from fusedkv_jax.cache.paged import Lane, PagedCall, PagedStore, copy_pages, put_pages, take_pages
from fusedkv_jax.generation.logprobs import Logprobs
from fusedkv_jax.generation.speculation import SelfSpeculation
from fusedkv_jax.model import Decoder
from fusedkv_jax.model.paging import extend_pages
from fusedkv_jax.serving.arrays import StepArrays, empty_arrays, step_arrays
from fusedkv_jax.serving.cache_form import CacheForm
from fusedkv_jax.serving.copies import Copy, Direction
from fusedkv_jax.serving.drafting import run_draft
from fusedkv_jax.serving.draws import TokenDraw
from fusedkv_jax.serving.plan import StepPlan
from fusedkv_jax.serving.runner import PromptScores, Runner, RunningStep
from fusedkv_jax.serving.scoring import PromptChunk, no_tokens, run_scored, scored_chunks
from fusedkv_jax.serving.settings import ServingSettings
from fusedkv_jax.serving.stand_ins import put_in

COPIES = 8  # pages that one program copies


class _Saved(NamedTuple):
    """Pages on the device, taken out of the pool, and their places in host memory."""

    targets: list[int]
    pages: PagedStore


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="pool")
def run_step(
    graph: nnx.GraphDef[Decoder],
    params: Any,
    pool: PagedStore,
    latest: Int[Array, "room"],
    tokens: Int[Array, "N"],
    lanes: tuple[Lane, ...],
    sampled: Int[Array, "R T"],
) -> tuple[Any, Int[Array, "N"], PagedStore]:
    """The step program: `extend_pages`, with the tokens that the step before has drawn for their
    stand-ins. The next ones are drawn by another program, which has fewer shapes.

    Returns:
        Logits, or None if nobody is sampled; the tokens; and the pool.
    """
    tokens = put_in(tokens, latest)
    call = PagedCall.of(lanes)
    logits, pool = extend_pages(nnx.merge(graph, params), tokens, call, pool, sampled)
    return logits, tokens, pool


_copy = jax.jit(copy_pages, donate_argnums=0)
_take = jax.jit(take_pages)
_put = jax.jit(put_pages, donate_argnums=0)


class PageRunner(Runner):
    """Runs a model over a pool of pages, a part of which may be in host memory."""

    def __init__(self, model: Decoder, settings: ServingSettings, form: CacheForm, mask_words: int):
        super().__init__(model, settings, form, mask_words)
        self._width = -(-form.max_model_len // form.size)
        self._host = self._host_pages(settings.host_pages)
        self._speculation = settings.speculation
        self._columns = 1 + settings.draft_tokens  # of a row in steps that check drafts

    def _start(self, plan: StepPlan, draws: Sequence[TokenDraw]) -> RunningStep:
        saved = self._carry_out(plan.copies)
        try:
            return self._compute(plan, draws)
        finally:  # beside the step, which has been sent off; after one that fails as well
            for pages in saved:
                self._put_down(pages)

    def _compute(self, plan: StepPlan, draws: Sequence[TokenDraw]) -> RunningStep:
        scores = self._score(plan)
        columns = self._columns if plan.drafts else 1
        arrays = step_arrays(plan, self.shapes, self._width, scores, columns)
        if len(scores) < len(plan.requests) or arrays.rows:
            self._logits = self._run(arrays)
        self.lower_rows += plan.tokens
        self.upper_rows += int(np.sum(arrays.sampled >= 0))
        return self._running(plan, draws, arrays.rows, scores, columns)

    def _run(self, arrays: StepArrays) -> Any:
        """Run the step program; the logits of the rows that are sampled."""
        inputs = self._latest, *arrays[:3]
        logits, self._last, self.pool = run_step(*self._split, self._donated(), *inputs)
        return logits

    def draft(self, plan: StepPlan, draws: Sequence[TokenDraw]) -> list[list[int]]:
        if plan.copies:  # they come first, and a draft writes to pages that they may read
            return [[] for _ in draws]
        arrays = step_arrays(plan, self.shapes, self._width)
        with self._placement.active():
            tokens, counts = self._draft(arrays, plan.room, draws)
        return [tokens[row, : counts[row]].tolist() for row in range(len(draws))]

    def _draft(
        self, arrays: StepArrays, room: Sequence[int], draws: Sequence[TokenDraw]
    ) -> tuple[np.ndarray, np.ndarray]:
        (lane,), rows = arrays.lanes, len(arrays.tokens)
        most = np.zeros(rows, np.int32)
        most[: len(room)] = room
        found, self.pool = run_draft(
            *self._split,
            self._donated(),
            arrays.tokens,
            lane,
            most,
            self._made(draws, rows),
            speculation=self._speculation,
        )
        tokens, counts = jax.device_get(found)
        self.lower_rows += int(counts.sum())
        return tokens, counts

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

    def _empty_pool(self) -> PagedStore:
        return PagedStore.create(
            self.config,
            num_pages=self.form.count,
            page_size=self.form.size,
            dtype=self._settings.cache_dtype,
        )

    def _warm_up(self) -> int:
        for rows, chunk_rows in self.shapes.all():
            arrays = empty_arrays(rows, chunk_rows, self.shapes.chunk, self._width)
            logits = self._run(arrays)
            if rows:
                self._warm_up_draws(logits)
        drafting = self._warm_up_drafts() if self._columns > 1 else 0
        nobody = no_tokens(self.shapes.chunk, self._width)
        _, self.pool = run_scored(*self._split, self._donated(), nobody, k=self._k)
        nowhere = np.full(COPIES, self.form.count, np.int32)
        self.pool = _copy(self.pool, nowhere * 0, nowhere * 0, np.int32(0))
        if self._host is not None:
            self.pool = _put(self.pool, nowhere, _take(self.pool, nowhere * 0))
        return len(self.shapes.all()) + drafting

    def _warm_up_drafts(self) -> int:
        """Compile what drafts, and what checks it; the number of shapes."""
        for rows in self.shapes.decode_rows:
            arrays = empty_arrays(rows, 0, self.shapes.chunk, self._width, self._columns)
            self._drawn(self._run(arrays), [])
            if isinstance(self._speculation, SelfSpeculation):
                self._draft(empty_arrays(rows, 0, self.shapes.chunk, self._width), [], [])
        return len(self.shapes.decode_rows)

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
                    self.pool = _put(self.pool, _padded(targets, self.form.count), pages)
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
