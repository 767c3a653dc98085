"""Runs the layers of a decoder: equal layers by one scan, streams handed from run to run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from fusedkv_jax.cache import Store
from fusedkv_jax.cache.calls import Reading, StreamWeights
from fusedkv_jax.cache.plan import StreamName
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KINDS, Kind, Run, runs
from fusedkv_jax.model.block import Block
from fusedkv_jax.model.mixing import Weights
from fusedkv_jax.model.rotary import Rotation
from fusedkv_jax.model.stream_plan import Bank
from fusedkv_jax.model.streams import Streams
from fusedkv_jax.trees import Leaf
from pallas_kernels.sources import SAVED
from pallas_kernels.stacked import read

Hidden = Float[Array, "B T D"]
Watch = Callable[[Reading], PyTree]
Angles = tuple[Float[Array, "*kinds B T h"], Float[Array, "*kinds B T h"]]  # see `Queries`
Tree = TypeVar("Tree")

Stores = tuple[Store, ...]
State = tuple[Hidden, Bank, Stores]

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # To a policy a kernel is no matrix product: its results have names.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(*SAVED),
    ),
    # What enters attention, by the names that `checkpoint_name` gives there: projections, norms of
    # heads and rotations are not repeated; attention and feed-forward are.
    "qkv": jax.checkpoint_policies.save_only_these_names("q", "k", "v"),
}


class Layers(NamedTuple):
    """The layers of a model, taken apart so that scans can pass over their parameters.

    Attributes:
        config: of the model.
        graphs: structure of the block at each place of each run's body.
        params: its parameters, those of all repeats stacked on a first axis; in a tuple if they are
            not to be scanned.
        weights: all stream weights.
    """

    config: ModelConfig
    graphs: list[list[nnx.GraphDef[Block]]]
    params: list[list[PyTree]]
    weights: Weights


@dataclass(frozen=True)
class Queries:
    """The rows that pass through some layers: their rotation, and positions if not all tokens'.

    Where layers differ in their rotary embedding, the rotation has those of all kinds, stacked.
    """

    rotation: Angles
    positions: Int[Array, "B T"] | None = None


@dataclass(frozen=True)
class Options:
    """What else a walk through layers does.

    Attributes:
        watch: called in every layer with what it has read; what it gives is in `Walked.seen`.
        kept: rows that each layer changes, [B, L] bool; it leaves the hidden states of the others
            as they are, and gives its streams for all. All rows by default.
        collects: keep what every layer gives, in `Walked.outputs`.
    """

    watch: Watch | None = None
    kept: Bool[Array, "B L"] | None = None
    collects: bool = False


class Walked(NamedTuple):
    """What a walk through layers gives.

    Attributes:
        x: hidden states [B, T, D].
        streams: what the layers have put and stored.
        seen: what `Options.watch` gave, by layer; of the last pass where a layer has several.
        outputs: what the layers gave, runs of them in order, [layers, B, T, D] each.
    """

    x: Hidden
    streams: Streams
    seen: dict[int, PyTree]
    outputs: tuple[Array, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "weights", "slots", "bank_slots", "kept", "rope"],
    meta_fields=[],
)
@dataclass(frozen=True)
class LayerInputs:
    """What one layer is given beside hidden states and streams; stacked, that of all repeats.

    Attributes:
        params: of its block.
        weights: of its fused and residual streams, [J, K, H].
        slots: where its own streams go in their stores.
        bank_slots: where they go in the bank, if anybody needs them there.
        kept: rows that it changes, [B] bool; None for all.
        rope: which of the rotary embeddings is its own; None where there is one.
    """

    params: PyTree
    weights: dict[Kind, Leaf]
    slots: dict[Kind, Leaf]
    bank_slots: dict[Kind, Leaf]
    kept: Leaf | None = None
    rope: Leaf | np.ndarray | None = None


def run_layers(
    layers: Layers,
    x: Hidden,
    streams: Streams,
    queries: Queries,
    span: tuple[int, int] | None = None,
    options: Options = Options(),
) -> Walked:
    """Pass rows through layers.

    Args:
        layers: of the model.
        x: hidden states that enter the first of them.
        streams: what they read and put.
        queries: the rows.
        span: half-open range of layers, by default all; a scanned body is taken whole or not at
            all.
        options: what else to do.
    """
    walk, walked = Walk(layers, queries, options), Walked(x, streams, {}, ())
    first, last = span or (0, layers.config.num_layers)
    # Runs do not cross the ends of a cyclic group: each is in one, or in none.
    for group, parts in itertools.groupby(walk.parts(streams, first, last), lambda part: part[0]):
        members = [(r, repeats) for _, r, repeats in parts]
        walked = (walk.iterate if group else walk.through)(members, walked)
    return walked


def run_layer(
    block: Block, layer: int, x: Hidden, streams: Streams, inputs: LayerInputs, walk: Walk
) -> tuple[Hidden, Streams, PyTree]:
    """One layer: hidden states, the streams with its own, and what was observed.

    Args:
        block: its modules.
        layer: its number; where equal layers are scanned, that of the first.
        x: hidden states.
        streams: what it reads.
        inputs: what differs from equal layers.
        walk: what is the same for all layers.
    """
    watch, positions = walk.options.watch, walk.queries.positions
    kv = walk.layers.config.kv_layout.layers[layer]
    fused: dict[Kind, StreamWeights] = {
        kind: inputs.weights.get(kind) if kv.stream(kind).is_fused else None for kind in KINDS
    }
    observed = watch is not None or streams.watches(layer)

    q, own = block.project(x, walk.rotation(inputs))
    streams = streams.put(layer, own, inputs.slots, inputs.weights)
    pieces = streams.read(layer, q, positions)
    out, lse = block.attend(q, pieces, fused, with_lse=observed)
    seen = None
    if observed:
        rows = streams.rows(layer, positions)
        assert lse is not None
        # Whoever looks gets arrays; attention may have read the same where they lie.
        arrays = tuple(p._replace(keys=read(p.keys), values=read(p.values)) for p in pieces)
        cap = walk.layers.config.block.attention_softcap
        reading = Reading(layer, streams.locate(layer), fused, q, arrays, lse, rows, cap)
        streams = streams.observe(reading)
        seen = None if watch is None else watch(reading)
    return block.finish(x, out), streams, seen


@dataclass(frozen=True)
class Walk:
    """A pass of some rows through layers: what is the same for all of them."""

    layers: Layers
    queries: Queries
    options: Options

    def parts(
        self, streams: Streams, first: int, last: int
    ) -> Iterator[tuple[tuple[int, int] | None, int, range]]:
        """(cyclic group or None, run, repeats) of all that lies in first..last-1, upwards."""
        layout = self.layers.config.kv_layout
        for r, run in enumerate(runs(layout)):
            groups = [g for g in layout.cyclic_groups if g[0] <= run.start < g[1]]
            for segment in streams.segments(run):
                if part := _within(run, segment, first, last):
                    yield (groups[0] if groups else None), r, part

    def through(self, parts: Sequence[tuple[int, range]], walked: Walked) -> Walked:
        """Runs one after the other."""
        for r, repeats in parts:
            walked = self.run(r, repeats, walked)
        return walked

    def iterate(self, parts: Sequence[tuple[int, range]], walked: Walked) -> Walked:
        """Passes of a cyclic group from the same input; upward reads see the last pass's streams.

        LCKV's parallel form (arXiv 2405.10637): gradients flow through the last passes only. After
        p passes the first p tokens are exact, so T passes equal token by token.
        """
        x, streams = walked.x, walked.streams
        free, learning = streams.passes()
        # Of the passes that are only steps towards the fixed point nothing is looked at: what a
        # compressor wants to see is what the last one reads.
        silent = dataclasses.replace(self.options, watch=None, collects=False)
        if free:
            config, graphs, params, weights = self.layers
            params, weights, start, bank, stores = jax.lax.stop_gradient(
                (params, weights, x, streams.bank, streams.stores)
            )
            frozen = Walk(Layers(config, graphs, params, weights), self.queries, silent)

            def free_pass(_: Array, held: tuple[Bank, Stores]) -> tuple[Bank, Stores]:
                inside = dataclasses.replace(streams, bank=held[0], stores=held[1])
                passed = frozen.through(parts, Walked(start, inside, {}, ())).streams
                return passed.bank, passed.stores

            # Constants to differentiation: nothing of these passes is kept, whatever their number.
            held = jax.lax.fori_loop(0, free, free_pass, (bank, stores))
            bank, stores = jax.lax.stop_gradient(held)
            all_runs = runs(config.kv_layout)
            members = range(all_runs[parts[0][0]].start, all_runs[parts[-1][0]].stop)
            passed = dataclasses.replace(streams, bank=bank, stores=stores)
            streams = streams.iterated(passed, members)
        quiet = Walk(self.layers, self.queries, silent)
        for number in range(learning):
            last = self if number == learning - 1 else quiet
            walked = last.through(parts, walked._replace(x=x, streams=streams))
            streams = walked.streams
        return walked

    def run(self, r: int, repeats: range, walked: Walked) -> Walked:
        """Some repeats of one run: a scan where their parameters are stacked."""
        config, run = self.layers.config, runs(self.layers.config.kv_layout)[r]
        streams = walked.streams.enter(run)
        inputs = [self.inputs(streams, r, place) for place in range(run.period)]
        first = run.start + repeats.start * run.period

        # What is read from outside the body, and the call, stay out of the loop's state: a scan
        # under differentiation would keep a copy of them for every layer. The bank and the stores
        # have to be in it, as layers write them; each layer updates one slot in place, and the
        # backward pass needs only the cotangents of what was written, not old banks.
        def body(state: State, inputs: list[LayerInputs]) -> tuple[State, tuple]:
            x, bank, stores = state
            inside, seen, outputs = dataclasses.replace(streams, bank=bank, stores=stores), [], []
            for place, layer in enumerate(inputs):
                y, inside, found = self.layer(r, first + place, place, layer, x, inside)
                x = y if layer.kept is None else jnp.where(layer.kept[:, None, None], y, x)
                seen.append(found)
                outputs.append(x)
            outputs = jnp.stack(outputs) if self.options.collects else None
            return (x, inside.bank, inside.stores), (seen, outputs)

        state = walked.x, streams.bank, streams.stores
        seen, outputs = dict(walked.seen), walked.outputs
        stacked = not isinstance(inputs[0].params, tuple)
        # One body for all repeats: the program, and the time to compile it, stay those of a few
        # layers at any depth.
        if len(repeats) > 1 and config.scan_layers and stacked:
            part = slice(repeats.start, repeats.stop)
            # Slicing makes a copy of the parameters, so not where all repeats are wanted.
            whole = len(repeats) == run.repeats
            state, (found, given) = jax.lax.scan(
                body, state, inputs if whole else _at(inputs, part)
            )
            outputs += () if given is None else (given.reshape(-1, *walked.x.shape),)
            by_repeat = [_at(found, i) for i in range(len(repeats))]
        else:
            by_repeat = []
            for repeat in repeats:
                state, (found, given) = body(state, [_repeat(layer, repeat) for layer in inputs])
                outputs += () if given is None else (given,)
                by_repeat.append(found)
        if self.options.watch is not None:
            layer_seen = itertools.chain.from_iterable(by_repeat)
            seen.update(enumerate(layer_seen, first))
        x, bank, stores = state
        return Walked(x, dataclasses.replace(streams, bank=bank, stores=stores), seen, outputs)

    def inputs(self, streams: Streams, r: int, place: int) -> LayerInputs:
        """What differs between the repeats of one place of a run's body, stacked."""
        layout = self.layers.config.kv_layout
        run = runs(layout)[r]
        numbers, plan = run.layers(place), streams.plan
        weights, slots, bank_slots = {}, {}, {}
        for kind in KINDS:
            stream = layout.layers[run.start + place].stream(kind)
            if stream.weights is not None:
                weights[kind] = jnp.stack([self.layers.weights[kind, i] for i in numbers])
            if stream.own:
                places = [plan.groups.places[kind, i][1] for i in numbers]
                slots[kind] = np.asarray(places, np.int32)
                bank = plan.bank_slots(kind, numbers)
                if bank is not None:
                    bank_slots[kind] = np.asarray(bank, np.int32)
        kept = self.options.kept
        kept = None if kept is None else kept.T[np.asarray(numbers)]
        config, rope = self.layers.config, None
        if len(config.rope_kinds) > 1:
            kinds = [config.rope_kinds.index(config.layer_ropes[i]) for i in numbers]
            rope = np.asarray(kinds, np.int32)
        return LayerInputs(self.layers.params[r][place], weights, slots, bank_slots, kept, rope)

    def rotation(self, inputs: LayerInputs) -> Rotation:
        """The rotation of a layer."""
        cos, sin = self.queries.rotation
        return (cos, sin) if inputs.rope is None else (cos[inputs.rope], sin[inputs.rope])

    def layer(
        self, r: int, i: int, place: int, inputs: LayerInputs, x: Hidden, streams: Streams
    ) -> tuple[Hidden, Streams, PyTree]:
        """`run_layer`, computed again in the backward pass if so configured."""
        remat, graph = self.layers.config.remat, self.layers.graphs[r][place]

        # What a layer makes of its own is an argument or a result, as the backward pass keeps the
        # arguments and computes the rest. The bank stays outside: what is written there is not
        # computed again.
        def compute(
            params: PyTree, weights: dict[Kind, Array], x: Hidden, read: tuple
        ) -> tuple[Hidden, Stores, dict[StreamName, Array], PyTree]:
            stores, views, new = read
            inside = dataclasses.replace(streams, stores=stores, views=views, new=new)
            given = dataclasses.replace(inputs, params=params, weights=weights)
            x, inside, seen = run_layer(nnx.merge(graph, params), i, x, inside, given, self)
            own = {name: inside.new[name] for name in inside.new if name[1] == i}
            return x, inside.stores, own, seen

        # A call that adds to a cache has no backward pass.
        if remat != "none" and streams.transient:
            compute = jax.checkpoint(compute, policy=_REMAT_POLICIES[remat])
        read = streams.stores, streams.views, streams.new
        x, stores, own, seen = compute(inputs.params, inputs.weights, x, read)
        streams = dataclasses.replace(
            streams,
            stores=stores,
            new=streams.new | own,
            slots=streams.slots | {(kind, i): slot for kind, slot in inputs.slots.items()},
        )
        return x, streams.keep(own, inputs.bank_slots), seen


def _within(run: Run, repeats: range, first: int, last: int) -> range:
    """The repeats whose layers all lie in first..last-1."""
    begin = -((run.start - first) // run.period)
    end = (last - run.start) // run.period
    return range(max(repeats.start, begin), min(repeats.stop, end))


def _at(tree: Tree, index: int | slice) -> Tree:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _repeat(inputs: LayerInputs, repeat: int) -> LayerInputs:
    """The inputs of one repeat."""
    if not isinstance(inputs.params, tuple):
        return _at(inputs, repeat)
    rest = _at(dataclasses.replace(inputs, params=None), repeat)
    return dataclasses.replace(rest, params=inputs.params[repeat])
