"""Grouping layers into runs that are scanned: a partition, into equal bodies."""

import itertools

import pytest

from fusedkv_jax import layouts
from fusedkv_jax.layouts import KINDS

NAMED = (
    *(name for name in layouts.names() if name != "window_hybrid"),
    "cla:k=3",
    "cla:k=5",
    "mlkv:m=5",
    "yoco:window=256",
    "lckv:w=4",
    "lckv:target=middle",
    "fusedkv:split=8",
)
HYBRIDS = ("window_hybrid", "window_hybrid:rebuild=window", "window_hybrid:upper=mha")
DEPTHS = [
    *itertools.product(NAMED, (12, 16, 24, 36)),
    *itertools.product(HYBRIDS, (16, 24, 36)),
]


class TestRuns:
    @pytest.mark.parametrize(("spec", "depth"), DEPTHS)
    def test_runs_partition_the_layers_into_equal_bodies(self, spec, depth):
        layout = layouts.resolve(spec, depth)
        runs = layouts.runs(layout)
        covered = [i for run in runs for i in range(run.start, run.stop)]
        assert covered == list(range(layout.num_layers))
        for border in (layout.prefill_depth, *sum(layout.cyclic_groups, ())):
            assert not any(run.start < border < run.stop for run in runs)
        for run in runs:
            for place in range(run.period):
                described = {_described(layout, run, i) for i in run.layers(place)}
                assert len(described) == 1

    @pytest.mark.parametrize(
        "spec", ["mha", "cla", "yoco", "yoco:window=64", "lckv", "fusedkv", "fusedkv_lite"]
    )
    def test_deeper_models_have_no_more_bodies(self, spec):
        sizes = [
            sum(run.period for run in layouts.runs(layouts.resolve(spec, depth)))
            for depth in (12, 24, 48)
        ]
        assert sizes[0] == sizes[1] == sizes[2] <= 4

    def test_fusedkv_is_two_scans(self):
        runs = layouts.runs(layouts.get("fusedkv", 16))
        assert [(run.start, run.period, run.repeats) for run in runs] == [(0, 1, 8), (8, 1, 8)]

    def test_exported_streams_are_those_that_other_bodies_read(self):
        assert layouts.exported(layouts.get("fusedkv", 16), "key") == (0, 7)
        assert layouts.exported(layouts.get("fusedkv_lite", 16), "value") == (0,)
        assert layouts.exported(layouts.get("cla", 16), "key") == (14,)  # 15 lies past the exit
        assert layouts.exported(layouts.get("mha", 16), "value") == ()
        assert layouts.exported(layouts.get("lckv", 16), "key") == (14,)
        assert layouts.exported(layouts.get("resformer", 16), "value") == (0,)


def _described(layout, run, i):
    """What a scanned body may not change between its repeats."""
    layer = layout.layers[i]
    body = run.start + (i - run.start) // run.period * run.period
    parts = [layer.window, layer.kv_norm]
    for kind in KINDS:
        stream = layer.stream(kind)
        sources = []
        for j in stream.sources:
            local = body <= j < body + run.period
            assert run.is_local(i, j) == local
            assert local or not run.start <= j < body, "reads an earlier body of its own run"
            sources.append(("here", j - body) if local else ("layer", j))
        stored = layout.stored_window(kind, i) if stream.own else None
        parts.append((stream.own, tuple(sources), stream.weights, stream.mixing, stored))
    return tuple(parts)
