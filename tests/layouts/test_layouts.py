"""The named layouts against the papers' tables, and what is derived from a layout."""

import pytest

from fusedkv_jax import layouts
from fusedkv_jax.layouts import (
    KINDS,
    LayoutError,
    named,
)

LOWER, ALL = tuple(range(6)), tuple(range(12))

# METHODS 2.1 for 12 layers: cached keys, cached values, layers of a prompt token, and cached
# streams read per decoded token (24 in the usual layout, 1.5 times that in FusedKV).
TABLE = {
    "mha": (ALL, ALL, 12, 24),
    "gqa": (ALL, ALL, 12, 24),
    "cla": ((0, 2, 4, 6, 8, 10), (0, 2, 4, 6, 8, 10), 11, 24),
    "cla:k=3": ((0, 3, 6, 9), (0, 3, 6, 9), 10, 24),
    "cla:k=5": ((0, 5, 10), (0, 5, 10), 11, 24),
    "mlkv:m=6": ((0, 2, 4, 6, 8, 10), (0, 2, 4, 6, 8, 10), 11, 24),
    "mlkv:m=5": ((0, 2, 4, 7, 9), (0, 2, 4, 7, 9), 10, 24),
    "mlkv:m=1": ((0,), (0,), 1, 24),
    "yoco": (LOWER, LOWER, 6, 24),
    "yoco:window=256": ((*LOWER, 6), (*LOWER, 6), 7, 24),
    "lckv": ((0, 10, 11), (0, 10, 11), 12, 24),
    "lckv:w=4": ((0, 1, 9, 10, 11), (0, 1, 9, 10, 11), 12, 24),
    "lckv:target=middle": ((0, 5, 11), (0, 5, 11), 12, 24),
    "lckv:w=1,target=bottom": ((0, 1), (0, 1), 2, 24),
    "dense_fusion": (LOWER, LOWER, 6, 2 * (6 + 6 * 6)),
    "fusedkv": (LOWER, LOWER, 6, 36),
    "fusedkv:split=8": (tuple(range(8)), tuple(range(8)), 8, 2 * (8 + 4 * 2)),
    "fusedkv_lite": (LOWER, LOWER, 6, 24),
    "lite_learnable": (LOWER, LOWER, 6, 24),
    "lite_reversed": (LOWER, LOWER, 6, 24),
    "yoco_pp": (LOWER, LOWER, 6, 24),
    "svformer": (ALL, (0,), 12, 24),
    "svformer_half": ((0, *ALL[2:]), (0,), 12, 24),
    "resformer": (ALL, ALL, 12, 24),
}


@pytest.mark.parametrize("spec", TABLE)
def test_what_each_named_layout_caches_and_reads(spec):
    layout = layouts.resolve(spec, 12)
    keys, values, depth, reads = TABLE[spec]
    assert layout.cached_keys == keys
    assert layout.cached_values == values
    assert layout.prefill_depth == depth
    assert layout.cache_ratio == (len(keys) + len(values)) / 24
    assert sum(len(layout.attended(kind, i)) for kind in KINDS for i in range(12)) == reads
    assert layout.spec == spec


def test_every_named_layout_is_in_the_table():
    assert set(layouts.names()) - {spec.partition(":")[0] for spec in TABLE} == {"window_hybrid"}


@pytest.mark.parametrize(
    ("spec", "key", "value"),
    [
        ("yoco", (5,), (5,)),
        ("yoco:window=64", (6,), (6,)),
        ("fusedkv", (0, 5), (0, 5)),
        ("fusedkv:key_sources=1+4,value_sources=2", (1, 4), (2,)),
        ("fusedkv_lite", (5,), (0,)),
        ("fusedkv_lite:key_source=3,value_source=2", (3,), (2,)),
        ("lite_learnable", (5,), (0,)),
        ("lite_reversed", (0,), (5,)),
        ("dense_fusion", LOWER, LOWER),
        ("yoco_pp", (5,), (5,)),
        ("svformer", (11,), (0,)),
        ("svformer_half", (11,), (0,)),
        ("resformer", (11,), (11,)),
        ("cla", (10,), (10,)),
        ("lckv:w=1", (11,), (11,)),
    ],
)
def test_what_the_top_layer_reads(spec, key, value):
    layout = layouts.resolve(spec, 12)
    assert layout.attended("key", 11) == key
    assert layout.attended("value", 11) == value


def test_streams_with_a_residual_attend_to_themselves_only():
    for spec in ("yoco_pp", "resformer"):
        layout = layouts.resolve(spec, 12)
        assert layout.layers[3].value.is_residual
        assert layout.layers[3].value.terms == 2
        assert layout.attended("value", 3) == (3,)
        assert 3 not in layout.readers("value", 0)


def test_fusedkv_recursion_is_anchored_at_mid_for_keys_and_layer_0_for_values():
    top = layouts.get("fusedkv", 8).layers[7]
    assert (top.key.sources[top.key.mixing.anchor], top.key.mixing.init) == (3, "recursive")
    assert (top.value.sources[top.value.mixing.anchor], top.value.mixing.init) == (
        0,
        "recursive",
    )


def test_lckv_shapes_of_the_paper():
    assert layouts.get("lckv", 22) == layouts.parse("0_20x20_21")
    assert layouts.get("lckv", 22, target="middle") == layouts.parse("0_10x20_21")
    assert layouts.get("svformer", 4) == layouts.parse("0_k1v0_k2v0_k3v0")


class TestCyclic:
    def test_span_reaches_the_highest_source(self):
        layout = layouts.parse("0_20x20_21")
        assert layout.is_cyclic
        assert layout.cyclic_groups == ((1, 21),)
        assert layout.prefill_depth == 22

    def test_span_follows_sources_of_sources(self):
        assert layouts.parse("2_1_4_3_4").cyclic_groups == ((0, 5),)

    def test_separate_groups_stay_apart(self):
        layout = layouts.parse("1_1_2_3_4_5_6_7_8_9_11_11")
        assert layout.cyclic_groups == ((0, 2), (10, 12))
        assert [layout.is_iterated(i) for i in (0, 1, 2, 9, 10)] == [True, True, False, False, True]
        assert layouts.parse("1_1_3_3_5_5_7_7").cyclic_groups == ((0, 2), (2, 4), (4, 6), (6, 8))
        assert layouts.parse("1_1_3_3").exits == (2,)

    def test_the_public_parser_case(self):
        layout = layouts.parse("1_2s_0")
        assert layout.cyclic_groups == ((0, 3),)
        assert layout.passes == (7, 2)
        assert layout.cached_keys == layout.cached_values == (0, 1, 2)
        assert [layout.attended("key", i) for i in range(3)] == [(1,), (2,), (0,)]
        assert layout.layers[1].window == 1024

    def test_reading_downwards_is_not_cyclic(self):
        assert not layouts.get("lckv", 12, target="bottom").is_cyclic
        assert layouts.get("fusedkv", 12).cyclic_groups == ()


class TestWindows:
    @pytest.mark.parametrize(
        ("options", "percent"),
        [
            ({"upper": "mha"}, 29.7),
            ({"rebuild": "window"}, 27.3),
            ({}, 14.8),
            ({"upper": "fusedkv_lite"}, 14.8),
        ],
    )
    def test_cache_of_the_hybrids_at_8192_tokens(self, options, percent):
        layout = layouts.get("window_hybrid", 16, **options)
        tokens = sum(
            min(layout.stored_window(kind, i) or 8192, 8192)
            for kind in KINDS
            for i in layout.cached(kind)
        )
        assert round(100 * tokens / (2 * 16 * 8192), 1) == percent

    def test_upper_layers_rebuild_from_their_own_type(self):
        layout = layouts.get("window_hybrid", 16)
        assert [i for i in range(16) if layout.layers[i].window is None] == [3, 7, 11, 15]
        assert layout.attended("key", 15) == layout.attended("value", 11) == (3, 7)
        assert layout.attended("key", 14) == layout.attended("value", 8) == (0, 6)
        assert layout.prefill_depth == 8

    def test_lite_takes_high_keys_and_low_values(self):
        layout = layouts.get("window_hybrid", 16, upper="fusedkv_lite")
        assert (layout.attended("key", 8), layout.attended("value", 8)) == ((6,), (0,))
        assert (layout.attended("key", 15), layout.attended("value", 15)) == ((7,), (3,))

    def test_rebuilding_windows_only_leaves_no_early_exit(self):
        layout = layouts.get("window_hybrid", 16, rebuild="window")
        assert layout.cached_keys == (*range(8), 11, 15)
        assert layout.prefill_depth == 16

    def test_a_stream_keeps_what_its_longest_reader_needs(self):
        layout = layouts.parse("0s8_1s8_0s32_1s16")
        assert [layout.stored_window("key", i) for i in (0, 1)] == [32, 16]

    def test_one_full_reader_keeps_everything(self):
        layout = layouts.parse("0s8_1s8_0")
        assert [layout.stored_window("value", i) for i in (0, 1)] == [None, 8]

    def test_streams_read_together_keep_the_same_length(self):
        # Layer 2 reads 0 and 1 together, so that layer 3's wish for 0 holds for 1 as well.
        layout = layouts.parse("0s8_1s8_f0+1s8_0s64")
        assert [layout.stored_window("key", i) for i in (0, 1)] == [64, 64]


class TestDraw:
    def test_one_line_a_layer_and_the_facts_below(self):
        text = layouts.draw(layouts.get("fusedkv", 4))
        lines = text.splitlines()
        assert lines[1].split() == "3 K 0 & 1 (channel) V 0 & 1 (channel) full".split()
        assert "prompt tokens stop below" in lines[2]
        assert lines[4].split() == "0 [K 0] [V 0] full".split()
        assert "prefill_depth  2 of 4 layers" in text
        assert "50.0% of 4 caching layers" in text

    def test_cyclic_and_residual_layers(self):
        assert "K 2 above" in layouts.draw(layouts.get("lckv", 4))
        assert "[V 1 + 0]" in layouts.draw(layouts.get("yoco_pp", 4))
        assert "own KV norm" in layouts.draw(layouts.get("yoco", 4, window=8))
        assert "serves K 0" in layouts.draw(layouts.parse("1_2s_0"))


def test_a_layout_of_ones_own_by_name(monkeypatch):
    monkeypatch.setattr(named, "_REGISTRY", dict(named._REGISTRY))

    @layouts.register
    def lowest(num_layers, split=2):
        """Upper layers read layer 0; options need no annotations."""
        return layouts.parse(f"{'_'.join(map(str, range(split)))}_0x{num_layers - split}")

    layout = layouts.resolve("lowest:split=3", 8)
    assert layout == layouts.parse("0_1_2_0x5") and layout.spec == "lowest:split=3"
    assert "lowest" in layouts.names() and not layouts.has_name(layout)
    monkeypatch.undo()
    assert not layouts.has_name(layout), "in a program that does not know the name"
    assert layouts.has_name(layouts.get("cla", 8, k=4)) and layouts.has_name(layouts.parse("0_0"))


def test_a_name_that_is_taken_and_a_function_that_gives_no_layout_are_one_line(monkeypatch):
    monkeypatch.setattr(named, "_REGISTRY", dict(named._REGISTRY))
    for name in ("fusedkv", "gqa"):

        def own(num_layers):
            return layouts.ordinary(num_layers)

        own.__name__ = name
        with pytest.raises(LayoutError, match=f"there is a layout '{name}' already"):
            layouts.register(own)
    for given, found in ((None, "None"), ("mha", "'mha'"), (layouts.ordinary(3), "3 layers")):

        @layouts.register
        def mine(num_layers):
            return given  # noqa: B023

        with pytest.raises(LayoutError, match=f"'mine' gave {found}; return a KVLayout of num_la"):
            layouts.get("mine", 4)
