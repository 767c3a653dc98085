"""Runs the layers of a decoder: equal layers by one scan, sources handed from run to run.

Training and decoding take this same path; a `Memory` says what a read gives.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fusedkv_jax.cache import Piece, Reading
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind, Run, runs
from fusedkv_jax.model.block import Block
from fusedkv_jax.model.memory import Memory, State
from fusedkv_jax.model.mixing import Weights, mix
from fusedkv_jax.model.rotary import Rotation

Hidden = Float[Array, "B T D"]
Views = dict[tuple[Kind, int], Any]
Watch = Callable[[Reading], Any]

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "qkv": jax.checkpoint_policies.save_only_these_names("q", "k", "v"),
}


@dataclass(frozen=True)
class Queries:
    """The rows that pass through some layers: their rotation, and positions if not all tokens'."""

    rotation: Rotation
    positions: Int[Array, "B T"] | None = None


class Stack:
    """The layers of one call.

    Args:
        config: the model's configuration.
        blocks: per run, per place of its body, the structure of a block and the parameters of all
            repeats, stacked on a first axis; in a tuple if they are not to be scanned.
        weights: all stream weights.
        memory: where streams are read from and kept.
        watch: called in every layer with what it has read; what it gives is kept in `found`.
        kept: rows that each layer changes, [B, L] bool; it leaves the hidden states of the others
            as they are, and gives its streams for all. All rows by default.
        collects: keep what every layer gives, in `outputs`.

    Attributes:
        outputs: what the layers gave, runs of them in order, [layers, B, T, D] each.
        found: what `watch` gave, by layer; of the last pass where a layer has several.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: list[list[tuple[nnx.GraphDef[Block], Any]]],
        weights: Weights,
        memory: Memory,
        watch: Watch | None = None,
        kept: Bool[Array, "B L"] | None = None,
        collects: bool = False,
    ):
        self.config, self.layout = config, config.kv_layout
        self.graphs = [[graph for graph, _ in run] for run in blocks]
        self.params = [[params for _, params in run] for run in blocks]
        self.weights = weights
        self.memory = memory
        self.watch = watch
        self.kept, self.collects = kept, collects
        self.outputs: list[Array] = []
        self.found: dict[int, Any] = {}
        self.runs = runs(self.layout)

    def __call__(
        self, x: Hidden, state: State, queries: Queries, first: int, last: int
    ) -> tuple[Hidden, State]:
        """Pass rows through layers first..last-1; a scanned body is taken whole or not at all."""
        params = (self.params, self.weights)
        # Runs do not cross the ends of a cyclic group: each is in one, or in none.
        for group, parts in itertools.groupby(self._parts(first, last), lambda part: part[0]):
            members = [(r, repeats) for _, r, repeats in parts]
            iterate = self._iterate if group else self._through
            x, state = iterate(members, params, x, state, queries)
        return x, state

    def _parts(self, first: int, last: int) -> Iterator[tuple[Any, int, range]]:
        """(cyclic group or None, run, repeats) of all that lies in first..last-1, upwards."""
        for r, run in enumerate(self.runs):
            groups = [g for g in self.layout.cyclic_groups if g[0] <= run.start < g[1]]
            for segment in self.memory.segments(run):
                if part := _within(run, segment, first, last):
                    yield (groups[0] if groups else None), r, part

    def _through(self, parts, params, x, state, queries) -> tuple[Hidden, State]:
        for r, part in parts:
            x, state = self._run(r, part, params, x, state, queries)
        return x, state

    def _iterate(self, parts, params, x, state, queries) -> tuple[Hidden, State]:
        """Passes of a cyclic group from the same input; upward reads see the last pass's streams.

        LCKV's parallel form (arXiv 2405.10637): gradients flow through the last passes only. After
        p passes the first p tokens are exact, so T passes equal token by token.
        """
        free, learning = self.memory.passes()
        silent = copy.copy(self)
        silent.watch, silent.collects = None, False
        if free:
            frozen, start, initial = jax.lax.stop_gradient((params, x, state))

            def free_pass(_, state):
                return silent._through(parts, frozen, start, state, queries)[1]

            passed = jax.lax.stop_gradient(jax.lax.fori_loop(0, free, free_pass, initial))
            layers = range(self.runs[parts[0][0]].start, self.runs[parts[-1][0]].stop)
            state = self.memory.rebanked(state, passed, layers)
        out = x
        for number in range(learning):
            passing = self if number == learning - 1 else silent
            out, state = passing._through(parts, params, x, state, queries)
        return out, state

    def _run(self, r, repeats, params, x, state, queries) -> tuple[Hidden, State]:
        run = self.runs[r]
        outer, fresh = self._outer_views(run, state)
        steps = [self._place_inputs(r, place, params) for place in range(run.period)]
        first = run.start + repeats.start * run.period

        def body(carry, steps):
            x, state = carry
            views, new = dict(outer), dict(fresh)
            found, given = [], []
            slots = {
                (kind, first + place): slot
                for place, step in enumerate(steps)
                for kind, slot in step["cache"].items()
            }
            for place, step in enumerate(steps):
                y, state, seen = self._layer(
                    first + place, self.graphs[r][place], step, slots, x, state, views, new, queries
                )
                x = y if self.kept is None else jnp.where(step["kept"][:, None, None], y, x)
                found.append(seen)
                given.append(x)
            return (x, state), (found, jnp.stack(given) if self.collects else None)

        carry = (x, state)
        stacked = not isinstance(steps[0]["block"], tuple)
        if len(repeats) > 1 and self.config.scan_layers and stacked:
            part = slice(repeats.start, repeats.stop)
            whole = len(repeats) == run.repeats
            carry, (seen, given) = jax.lax.scan(body, carry, steps if whole else _at(steps, part))
            if given is not None:
                self.outputs.append(given.reshape(-1, *x.shape))
            self._keep(run, repeats, [_at(seen, i) for i in range(len(repeats))])
            return carry
        for repeat in repeats:
            carry, (seen, given) = body(carry, [_repeat(step, repeat) for step in steps])
            if given is not None:
                self.outputs.append(given)
            self._keep(run, range(repeat, repeat + 1), [seen])
        return carry

    def _keep(self, run: Run, repeats: range, seen: list[list[Any]]) -> None:
        if self.watch is not None:
            for repeat, places in zip(repeats, seen, strict=True):
                start = run.start + repeat * run.period
                self.found.update({start + place: found for place, found in enumerate(places)})

    def _outer_views(self, run: Run, state: State) -> tuple[Views, Views]:
        """Streams of other runs that this run attends to, and that it mixes in as residuals."""
        views, fresh = {}, {}
        for place in range(run.period):
            i = run.start + place
            for kind in KINDS:
                stream = self.layout.layers[i].stream(kind)
                for j in stream.sources:
                    if j < i and run.is_local(i, j):
                        continue
                    if stream.is_residual:
                        fresh[kind, j] = self.memory.fresh(state, kind, j)
                    else:
                        views[kind, j] = self.memory.outer(state, kind, j)
        return views, fresh

    def _place_inputs(self, r: int, place: int, params) -> dict[str, Any]:
        """What differs between the repeats of one place of a run's body, stacked."""
        run = self.runs[r]
        layers = run.layers(place)
        blocks, weights = params
        inputs: dict[str, Any] = {
            "block": blocks[r][place],
            "weights": {},
            "cache": {},
            "bank": {},
        }
        for kind in KINDS:
            stream = self.layout.layers[run.start + place].stream(kind)
            if stream.weights is not None:
                inputs["weights"][kind] = jnp.stack([weights[kind, i] for i in layers])
            if not stream.own:
                continue
            inputs["cache"][kind] = np.asarray(self.memory.slots(kind, layers), np.int32)
            bank = self.memory.bank_slots(kind, run, place)
            if bank is not None:
                inputs["bank"][kind] = np.asarray(bank, np.int32)
        if self.kept is not None:
            inputs["kept"] = self.kept.T[np.asarray(layers)]
        return inputs

    def _layer(self, i, graph, step, slots, x, state, views, fresh, queries):
        """One layer; adds its new streams to `views` and `fresh`, for its body's later layers."""

        def compute(params, weights, x, cache, views, fresh):
            block = nnx.merge(graph, params)
            return self._block(i, block, weights, slots, x, cache, views, fresh, queries)

        if self.config.remat != "none" and self.memory.differentiable:
            compute = jax.checkpoint(compute, policy=_REMAT_POLICIES[self.config.remat])
        x, cache, new, found = compute(step["block"], step["weights"], x, state.cache, views, fresh)
        state = state._replace(cache=cache)
        for kind, stream in new.items():
            fresh[kind, i] = stream
            views[kind, i] = self.memory.view(cache, kind, i, slots[kind, i], stream)
            if kind in step["bank"]:
                state = self.memory.bank(state, kind, step["bank"][kind], stream)
        return x, state, found

    def _block(self, i, block, weights, slots, x, cache, views, fresh, queries):
        layer = self.layout.layers[i]
        fused: dict[Kind, Any] = {
            kind: weights.get(kind) if layer.stream(kind).is_fused else None for kind in KINDS
        }
        new: dict[Kind, Array] = {}
        found = None

        def read(own: dict[Kind, Array], q: Array):
            nonlocal cache
            sources = []
            for kind in KINDS:
                stream = layer.stream(kind)
                if stream.own:
                    new[kind] = own[kind]
                    if stream.is_residual:
                        terms = [fresh[kind, j] for j in stream.sources] + [own[kind]]
                        new[kind] = mix(weights[kind], terms)
                    cache = self.memory.store(cache, kind, i, slots[kind, i], new[kind])
                if stream.reads_self:
                    view = self.memory.view(cache, kind, i, slots[kind, i], new[kind])
                    sources.append((view,))
                else:
                    sources.append(tuple(views[kind, j] for j in stream.sources))
            return self.memory.pieces(cache, i, tuple(sources), q, queries.positions)

        def watch(q: Array, pieces: tuple[Piece, ...], lse: Array) -> None:
            nonlocal cache, found
            rows = self.memory.rows(i, queries.positions)
            reading = Reading(i, self._slots(i, slots), fused, q, pieces, lse, rows)
            if self.memory.watches(i):
                cache = self.memory.watch(cache, reading)
            if self.watch is not None:
                found = self.watch(reading)

        watched = self.watch is not None or self.memory.watches(i)
        x = block(x, queries.rotation, read, fused, watch if watched else None)
        return x, cache, new, found

    def _slots(self, i: int, local: dict[tuple[Kind, int], Any]) -> dict[Kind, tuple[Any, ...]]:
        """Places of the sources that a layer reads; `local`: those of its own body."""
        return {
            kind: tuple(
                local[kind, j] if (kind, j) in local else self.memory.slots(kind, [j])[0]
                for j in self.layout.attended(kind, i)
            )
            for kind in KINDS
        }


def _within(run: Run, repeats: range, first: int, last: int) -> range:
    """The repeats whose layers all lie in first..last-1."""
    begin = -((run.start - first) // run.period)
    end = (last - run.start) // run.period
    return range(max(repeats.start, begin), min(repeats.stop, end))


def _at(tree: Any, index: int | slice) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _repeat(step: dict[str, Any], repeat: int) -> dict[str, Any]:
    """What `Stack._place_inputs` gives for one repeat."""
    block = step["block"]
    if not isinstance(block, tuple):
        return _at(step, repeat)
    return {name: _at(part, repeat) for name, part in step.items() if name != "block"} | {
        "block": block[repeat]
    }
