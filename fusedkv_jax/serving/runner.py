"""What runs planned steps on the device: the model, the caches of requests, and the sampler."""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fusedkv_jax.generation.logprobs import Logprobs
from fusedkv_jax.generation.programs import GenerationPrograms
from fusedkv_jax.generation.settings import EngineSettings
from fusedkv_jax.model import Decoder
from fusedkv_jax.serving.cache_form import CacheForm
from fusedkv_jax.serving.draws import DrawArrays, Draws, TokenDraw, draw_tokens
from fusedkv_jax.serving.plan import StepPlan
from fusedkv_jax.serving.settings import ServingSettings
from fusedkv_jax.serving.stand_ins import stand_in
from fusedkv_jax.sharding import constrain

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
        drawn: for each request of the plan what was drawn: nothing, a token, or those that were
            drafted rightly and one more.
        scores: those of prompts that are scored, by the request's place in the plan.
    """

    drawn: list[list[Drawn]]
    scores: dict[int, list[PromptScores]]


class RunningStep:
    """A step that the device computes.

    Args:
        plan: what it computes.
        rows: places in the plan of the requests whose next tokens are drawn, in the order of
            their stand-ins.
        columns: tokens that are drawn for each of them.
        found: the tokens and their log-probabilities, on the device; None if nothing is drawn.
        last: something else that the step gives, which is there when it has been computed; None
            if it has been already.
        scores: those of prompts that are scored.
    """

    def __init__(
        self,
        plan: StepPlan,
        rows: Sequence[int],
        columns: int,
        found: tuple[Int[Array, "M"], Logprobs] | None,
        last: Array | None,
        scores: dict[int, list[PromptScores]],
    ):
        self._plan, self._rows, self._columns = plan, rows, columns
        self._found, self._last, self._scores = found, last, scores

    @property
    def stand_ins(self) -> list[int | None]:
        """What stands for the token of each request of the plan, in the step after this one; None
        where none is drawn."""
        tokens: list[int | None] = [None] * len(self._plan.requests)
        for row, place in enumerate(self._rows):
            tokens[place] = stand_in(row)
        return tokens

    def result(self) -> StepResult:
        """Wait for what it gives. Raises what has gone wrong on the device."""
        drawn: list[list[Drawn]] = [[] for _ in self._plan.requests]
        if self._found is None:
            jax.block_until_ready(self._last)  # or long prompts would queue up on the device
            return StepResult(drawn, self._scores)
        found, drafts = jax.device_get(self._found), self._plan.drafts
        for row, place in enumerate(self._rows):
            first = row * self._columns
            right = _agreement(drafts[place], found[0][first:]) if drafts else 0
            drawn[place] = [_row(found, first + column) for column in range(right + 1)]
        return StepResult(drawn, self._scores)


@functools.partial(jax.jit, static_argnames="room")
def _no_tokens(room: int) -> Int[Array, "room"]:
    return constrain(jnp.zeros(room, jnp.int32), None)


@functools.partial(jax.jit, static_argnames="k")
def _draw(
    logits: Float[Array, "M V"], draws: Draws, k: int
) -> tuple[tuple[Int[Array, "M"], Logprobs], Int[Array, "room"]]:
    """As `draw_tokens`; and the tokens once more, for the step after this one."""
    tokens, logprobs = draw_tokens(logits, draws, k)
    room = draws.latest.shape[0]
    latest = jnp.zeros(room, jnp.int32).at[: len(tokens)].set(tokens[:room])
    return (tokens, logprobs), constrain(latest, None)


def _draw_more(
    logits: Float[Array, "S V"], row: Int[Array, ""], draws: Draws, k: int
) -> tuple[Int[Array, "M"], Logprobs]:
    """Further tokens from one row of the logits."""
    size = draws.lengths.shape[0]
    return draw_tokens(jnp.broadcast_to(logits[row], (size, logits.shape[1])), draws, k)


_draw_again = jax.jit(_draw_more, static_argnames="k")


class Runner(abc.ABC):
    """A model, the caches of its requests, and the programs over both.

    Args:
        model: the model.
        settings: sizes of steps, and how many likeliest tokens are told of each place.
        form: how the caches lie.
        mask_words: 32-bit words of a mask of the vocabulary.

    Attributes:
        pool: the caches, which every program takes and gives back.
        lower_rows, upper_rows: tokens that have passed through the layers that cache something,
            and through those above.
    """

    def __init__(self, model: Decoder, settings: ServingSettings, form: CacheForm, mask_words: int):
        programs = GenerationPrograms.of(model, EngineSettings(mesh=settings.mesh()))
        self.config, self.shapes = programs.model.config, settings.make_shapes()
        self.form, self._settings, self._split = form, settings, programs.split
        self._placement = programs.placement
        self._draws = DrawArrays(form.max_model_len, mask_words)
        self._k = min(settings.max_logprobs, self.config.vocab_size)
        self._logits: Any = None  # of the rows of the last step that were sampled
        self.lower_rows = self.upper_rows = 0
        self.reset()

    def start(self, plan: StepPlan, draws: Sequence[TokenDraw]) -> RunningStep:
        """Let the device compute a plan, behind the steps that it computes already.

        Args:
            plan: what to compute; its copies come first. Known tokens may be stand-ins for those
                of the step before.
            draws: how the next token of each of its requests is drawn.
        """
        with self._placement.active():
            return self._start(plan, draws)

    def draft(self, plan: StepPlan, draws: Sequence[TokenDraw]) -> list[list[int]]:
        """What the model's own lower layers guess, as many tokens as the plan has room for; nothing
        if it copies pages.

        Args:
            plan: what is computed next, in which all requests decode.
            draws: as for `run`.
        """
        raise NotImplementedError

    def warm_up(self) -> int:
        """Compile the programs of all shapes; the number of shapes."""
        latest = self._latest  # a step may be under way
        with self._placement.active():
            shapes = self._warm_up()
        self._latest = latest
        return shapes

    @abc.abstractmethod
    def _start(self, plan: StepPlan, draws: Sequence[TokenDraw]) -> RunningStep: ...

    @abc.abstractmethod
    def _warm_up(self) -> int: ...

    @abc.abstractmethod
    def _empty_pool(self) -> Any:
        """Caches without a token."""

    def reset(self) -> None:
        """Empty caches, for example where a step that failed has used up the old ones; and nothing
        of what it should have given."""
        most = max(self.shapes.decode_rows[-1], self.shapes.mixed_rows[-1])
        self._last: Any = None  # of what the last step gives, what stays
        with self._placement.active():
            self._latest = _no_tokens(most)  # tokens of the rows that were sampled
            self.pool: Any = self._placement.allocated(self._empty_pool)

    @property
    def lost(self) -> bool:
        """A step that failed has used up the pool, or should have given it or the latest tokens,
        which every step takes."""
        pool = getattr(self, "pool", None)
        if pool is None or any(x.is_deleted() for x in jax.tree.leaves(pool)):
            return True
        try:
            jax.block_until_ready((pool, self._latest))
        except Exception:  # whatever has failed on the device, it is told where it is awaited
            return True
        return False

    def fork(self, row: int, draws: Sequence[TokenDraw]) -> list[Drawn]:
        """Further tokens from the logits of a row of the last step.

        Args:
            row: its number among the rows that were sampled.
            draws: how they are drawn.
        """
        results = []
        for start in range(0, len(draws), FORKS):
            part = draws[start : start + FORKS]
            made = self._made(part, FORKS)
            with self._placement.active():
                found = jax.device_get(_draw_again(self._logits, np.int32(row), made, k=self._k))
            results += [_row(found, i) for i in range(len(part))]
        return results

    def _running(
        self,
        plan: StepPlan,
        draws: Sequence[TokenDraw],
        rows: Sequence[int],
        scores: dict[int, list[PromptScores]],
        columns: int = 1,
    ) -> RunningStep:
        """Draw for the requests whose places are the rows of the logits, so many columns each."""
        found = None
        if rows:
            wanted = [draws[place] for place in rows]
            if plan.drafts:  # behind the last of its drafts, a request draws for nobody
                drafts = [plan.drafts[place] for place in rows]
                wanted = [
                    draw._replace(drafts=own[:column])
                    for draw, own in zip(wanted, drafts, strict=True)
                    for column in range(columns)
                ]
            found = self._drawn(self._logits, wanted)
        return RunningStep(plan, rows, columns, found, self._last, scores)

    def _drawn(
        self, logits: Float[Array, "M V"], draws: Sequence[TokenDraw]
    ) -> tuple[Int[Array, "M"], Logprobs]:
        """What is drawn from rows of logits, on the device, where the next step finds it too."""
        found, self._latest = _draw(logits, self._made(draws, logits.shape[0]), k=self._k)
        return found

    def _made(self, draws: Sequence[TokenDraw], size: int) -> Draws:
        """Draws as arrays, padded to a size."""
        return self._draws.make(draws, size, self._latest)

    def _warm_up_draws(self, logits: Float[Array, "S V"]) -> None:
        """Compile what draws from so many rows."""
        self._drawn(logits, [])
        _draw_again(logits, np.int32(0), self._made([], FORKS), k=self._k)

    def _donated(self) -> Any:
        """The pool, for a program that takes it and gives it back."""
        pool = self.pool
        del self.pool
        return pool


def _agreement(drafts: Sequence[int], tokens: np.ndarray) -> int:
    """How many tokens were drafted as they were drawn."""
    pairs = enumerate(zip(drafts, tokens, strict=False))
    return next((number for number, (a, b) in pairs if a != b), len(drafts))


def _row(found: tuple[np.ndarray, Logprobs], row: int) -> Drawn:
    tokens, logprobs = found
    return Drawn(int(tokens[row]), jax.tree.map(lambda x: x[row : row + 1], logprobs))
