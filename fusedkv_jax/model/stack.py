"""Runs the layers of a decoder: equal layers by one scan, sources handed from run to run.

Training and decoding take this same path; a `Memory` says what a read gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind, Run, runs
from fusedkv_jax.model.block import Block
from fusedkv_jax.model.memory import CacheMemory, Memory, State
from fusedkv_jax.model.mixing import Weights, mix
from fusedkv_jax.model.rotary import Rotation

Hidden = Float[Array, "B T D"]
Views = dict[tuple[Kind, int], Array]

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
        blocks: per run, per place of its body, the blocks of all repeats stacked on a first axis.
        weights: all stream weights.
        memory: where streams are read from and kept.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: list[list[tuple[nnx.GraphDef[Block], Any]]],
        weights: Weights,
        memory: Memory,
    ):
        self.config, self.layout = config, config.kv_layout
        self.graphs = [[graph for graph, _ in run] for run in blocks]
        self.params = [[params for _, params in run] for run in blocks]
        self.weights = weights
        self.memory = memory
        self.runs = runs(self.layout)

    def __call__(
        self, x: Hidden, state: State, queries: Queries, first: int, last: int
    ) -> tuple[Hidden, State]:
        """Pass rows through layers first..last-1."""
        span = self.layout.cyclic_span or (last, last)
        index = [r for r, run in enumerate(self.runs) if first <= run.start and run.stop <= last]
        before = [r for r in index if self.runs[r].stop <= span[0]]
        cycle = [r for r in index if span[0] <= self.runs[r].start < span[1]]
        after = [r for r in index if self.runs[r].start >= span[1]]
        params = (self.params, self.weights)
        x, state = self._through(before, params, x, state, queries)
        if cycle:
            x, state = self._iterate(cycle, params, x, state, queries)
        return self._through(after, params, x, state, queries)

    def _through(self, index, params, x, state, queries) -> tuple[Hidden, State]:
        for r in index:
            x, state = self._run(r, params, x, state, queries)
        return x, state

    def _iterate(self, index, params, x, state, queries) -> tuple[Hidden, State]:
        """Passes of a cyclic group from the same input; upward reads see the last pass's streams.

        LCKV's parallel form (arXiv 2405.10637): gradients flow through the last passes only. After
        p passes the first p tokens are exact, so T passes equal token by token.
        """
        free, learning = self.layout.passes
        if isinstance(self.memory, CacheMemory):
            total = min(free + learning, x.shape[1])

            def infer(_, carry):
                return self._through(index, params, x, carry[1], queries)

            return jax.lax.fori_loop(0, total, infer, (x, state))
        frozen, start = jax.lax.stop_gradient((params, x))

        def free_pass(_, state):
            return self._through(index, frozen, start, state, queries)[1]

        state = jax.lax.stop_gradient(jax.lax.fori_loop(0, free, free_pass, state))
        out = x
        for _ in range(learning):
            out, state = self._through(index, params, x, state, queries)
        return out, state

    def _run(self, r, params, x, state, queries) -> tuple[Hidden, State]:
        run = self.runs[r]
        outer, fresh = self._outer_views(run, state)
        steps = [self._place_inputs(r, place, params) for place in range(run.period)]

        def body(carry, steps):
            x, state = carry
            views, new = dict(outer), dict(fresh)
            for place, step in enumerate(steps):
                x, state = self._layer(r, place, step, x, state, views, new, queries)
            return (x, state), None

        carry = (x, state)
        if run.repeats > 1 and self.config.scan_layers:
            return jax.lax.scan(body, carry, steps)[0]
        for repeat in range(run.repeats):
            carry, _ = body(carry, jax.tree.map(lambda leaf, i=repeat: leaf[i], steps))
        return carry

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
            if isinstance(self.memory, CacheMemory):
                slots = [self.memory.plan.places[kind, i][1] for i in layers]
                inputs["cache"][kind] = np.asarray(slots, np.int32)
            bank = self.memory.bank_slots(kind, run, place)
            if bank is not None:
                inputs["bank"][kind] = np.asarray(bank, np.int32)
        return inputs

    def _layer(self, r, place, step, x, state, views, fresh, queries) -> tuple[Hidden, State]:
        """One layer; adds its new streams to `views` and `fresh`, for its body's later layers."""
        i = self.runs[r].start + place
        graph = self.graphs[r][place]

        def compute(params, weights, x, cache, views, fresh):
            return self._block(
                i, nnx.merge(graph, params), weights, step, x, cache, views, fresh, queries
            )

        if self.config.remat != "none" and not isinstance(self.memory, CacheMemory):
            compute = jax.checkpoint(compute, policy=_REMAT_POLICIES[self.config.remat])
        x, cache, new = compute(step["block"], step["weights"], x, state.cache, views, fresh)
        state = state._replace(cache=cache)
        for kind, stream in new.items():
            fresh[kind, i] = stream
            views[kind, i] = self.memory.view(cache, kind, i, step["cache"].get(kind, 0), stream)
            if kind in step["bank"]:
                state = self.memory.bank(state, kind, step["bank"][kind], stream)
        return x, state

    def _block(self, i, block, weights, step, x, cache, views, fresh, queries):
        layer, dtype = self.layout.layers[i], x.dtype
        new: dict[Kind, Array] = {}

        def read(own: dict[Kind, Array]):
            nonlocal cache
            sources = []
            for kind in KINDS:
                stream = layer.stream(kind)
                if stream.own:
                    new[kind] = own[kind]
                    if stream.is_residual:
                        terms = [fresh[kind, j] for j in stream.sources] + [own[kind]]
                        new[kind] = mix(weights[kind], terms)
                    slot = step["cache"].get(kind, 0)
                    cache = self.memory.store(cache, kind, i, slot, new[kind])
                if stream.reads_self:
                    slot = step["cache"].get(kind, 0)
                    found = (self.memory.view(cache, kind, i, slot, new[kind]),)
                else:
                    found = tuple(views[kind, j] for j in stream.sources)
                sources.append(tuple(source.astype(dtype) for source in found))
            return tuple(sources)

        fused = {kind: weights.get(kind) if layer.stream(kind).is_fused else None for kind in KINDS}
        mask = self.memory.mask(i, queries.positions)
        x = block(x, queries.rotation, read, fused, mask)
        return x, cache, new
