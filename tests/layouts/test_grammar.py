"""The layer-types grammar, and what layouts refuse and say about it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedkv_jax import layouts
from fusedkv_jax.config import ModelConfig
from fusedkv_jax.layouts import KVLayout, LayerKV, LayoutError, Mixing, Stream, reuse

OWN = Stream(own=True)


class TestGrammar:
    @pytest.mark.parametrize("spec", ["0_1_2_3_f0+3x4", "0_1x2_k1v0", "0s4x2_1s9"])
    def test_repeats_and_windows_expand(self, spec):
        tokens = []
        for token in spec.split("_"):
            body, _, count = token.partition("x")
            tokens += [body] * int(count or 1)
        assert layouts.parse(spec) == layouts.parse("_".join(tokens))

    def test_names_of_the_same_layout_agree(self):
        assert layouts.parse("0_1_2_3") == layouts.get("mha", 4)
        assert layouts.parse("0x2_2x2_4x2") == layouts.get("cla", 6)
        assert layouts.parse("0_1_2_3_3x4") == layouts.get("yoco", 8)
        assert layouts.parse("0_1_2_3_k3v0x4") == layouts.get("fusedkv_lite", 8)
        assert layouts.parse("0_1_2_3_f0+3x4") == layouts.get("fusedkv", 8)

    def test_window_and_passes_of_the_call_survive_in_the_spec(self):
        layout = layouts.parse("1s_1s", window=16, passes=(3, 1))
        assert layout.layers[0].window == 16
        again = layouts.resolve(layout.spec, 2)
        assert again == layout
        assert again.passes == (3, 1)

    @given(st.data())
    def test_round_trip(self, data):
        num_layers = data.draw(st.integers(1, 7))
        owners = sorted(data.draw(st.sets(st.integers(0, num_layers - 1), min_size=1)))
        tokens, expected = [], []
        for i in range(num_layers):
            if i in owners:
                keys = values = (i,)
            elif len(below := [j for j in owners if j < i]) > 1 and data.draw(st.booleans()):
                some = data.draw(st.sets(st.sampled_from(below), min_size=2))
                keys = values = tuple(sorted(some))
            else:
                keys = (data.draw(st.sampled_from(owners)),)
                values = (data.draw(st.sampled_from(owners)),)
            window = data.draw(st.sampled_from([None, 2, 512]))
            body = f"k{keys[0]}v{values[0]}" if keys != values else f"{keys[0]}"
            body = "f" + "+".join(map(str, keys)) if len(keys) > 1 else body
            tokens.append(body + (f"s{window}" if window else ""))
            expected.append((keys, values, window))
        layout = layouts.parse("_".join(tokens))
        found = [
            (layout.attended("key", i), layout.attended("value", i), layout.layers[i].window)
            for i in range(num_layers)
        ]
        assert found == expected
        assert layout.cached_keys == layout.cached_values == tuple(owners)
        assert layouts.parse(layouts.format(layout)) == layout

    @given(st.text(alphabet="0123f+kvsx_", max_size=8).filter(lambda t: "x" not in t))
    def test_any_text_is_a_layout_or_a_layout_error(self, text):
        try:
            layout = layouts.parse(text)
        except LayoutError:
            return
        assert layouts.parse(layouts.format(layout)) == layout

    @pytest.mark.parametrize("passes", [(3, 1), (0, 1), (7, 2)])
    def test_format_keeps_passes(self, passes):
        named = layouts.get("lckv", 8, forward_passes=passes[0], backward_passes=passes[1])
        for layout in (named, layouts.parse("0_1s4x3", passes=passes)):
            again = layouts.resolve(layouts.format(layout), layout.num_layers)
            assert again == layout
            assert again.passes == passes
        assert (layouts.format(named) == "0_6x6_7") == (passes == (7, 2))

    def test_format_refuses_what_the_grammar_cannot_say(self):
        for name in ("resformer", "yoco_pp", "lite_learnable", "dense_fusion"):
            with pytest.raises(LayoutError, match="cannot express"):
                layouts.format(layouts.get(name, 8))


@pytest.mark.usefixtures("without_type_checks")
class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("0_7", "layer 1, keys: source 7 is not a layer; layers are 0 to 1"),
            ("0_q", "cannot read 'q'"),
            ("", "cannot read ''"),
            ("f1+2_1_2", "layer 0, keys: source 1 lies above its reader"),
            ("0_f0+1", "layer 1, keys: fused, so no layer can read them"),
            ("0_1_f0+0", "must ascend without repeating"),
            ("0_1_f1+0", "must ascend without repeating"),
            ("0_1x0", "cannot read .1x0."),
            ("0s0", "layer 0: window=0"),
            ("1s1_1", "layer 0: with a source above.*use at least 2"),
        ],
    )
    def test_grammar(self, text, message):
        with pytest.raises(LayoutError, match=message):
            layouts.parse(text)

    @pytest.mark.parametrize(
        ("spec", "num_layers", "message"),
        [
            ("fusdkv", 8, "unknown layout 'fusdkv'; did you mean fusedkv"),
            ("cla:q=2", 8, "layout 'cla' has no option 'q'; choose k"),
            ("cla:num_layers=8", 8, "layout 'cla' has no option 'num_layers'; choose k"),
            ("cla:name=mha", 8, "layout 'cla' has no option 'name'; choose k"),
            ("mha:options=1", 8, "layout 'mha' has no option 'options'; choose none"),
            ("fusedkv:key_sources=²+3", 8, "option key_sources='²[+]3'; use a whole number"),
            ("fusedkv:granularty=head", 8, "did you mean granularity"),
            ("cla:k", 8, "write options as name:key=value"),
            ("cla:k=0", 8, "k=0; use 1 to num_layers=8"),
            ("fusedkv", 7, "num_layers=7 is odd; give split="),
            ("fusedkv:split=9", 8, "split=9; use 2 to num_layers=8"),
            ("fusedkv:split=1", 8, "split=1; use 2 to"),
            ("mlkv:m=9", 8, "m=9; use 1 to num_layers=8"),
            ("lckv:w=8", 8, "w=8; use 0 to 7"),
            ("lckv:target=0", 8, "target=0; choose top, middle, bottom or 1 to 6"),
            ("lckv:forward_passes=-1", 8, r"passes=\(-1, 2\)"),
            ("fusedkv:granularity=row", 8, "granularity='row'; choose scalar, head, channel"),
            ("fusedkv:parameterization=x", 8, "parameterization='x'; choose equivalent"),
            ("yoco:window=8,own_norm=false", 8, "needs own_norm=True"),
            ("window_hybrid:upper=x", 16, "upper='x'; choose fusedkv"),
            ("window_hybrid:rebuild=x", 16, "rebuild='x'; choose all, window"),
            ("window_hybrid", 12, "layer 7 needs two layers of its type below split=6"),
            ("0_1", 3, "layout '0_1' has 2 layers but num_layers=3"),
            ("0_1:k=2", 2, "has no option 'k'; choose window, passes"),
            ("mha", 0, "num_layers=0; use at least 1"),
            ("cla:k=abc", 8, "option k='abc'; use a whole number"),
            ("cla:k=2.5", 8, "option k=2.5; use a whole number"),
            ("fusedkv:split=x", 8, "option split='x'; use a whole number or None"),
            ("fusedkv:key_sources=0+x", 8, "use a whole number, a tuple of whole numbers or None"),
            ("fusedkv:key_sources=3+0", 8, "must ascend without repeating"),
            ("0_1:passes=9", 2, "window=1024,passes=7"),
            ("0s_1:window=x", 2, "window=1024,passes=7"),
            ("window_hybrid:full_every=0", 16, "full_every=0; use at least 1"),
            ("yoco_pp:scale=nan", 8, "option scale=nan; use a number"),
            ("yoco_pp:scale=1e999", 8, "option scale=inf; use a number"),
            ("yoco_pp:scale=0", 8, "scale=0; use a number above 0"),
            ("cla:k=2,k=4", 8, "sets k twice; keep one"),
            ("cla:", 8, "write options as name:key=value"),
            ("cla:k=2,", 8, "write options as name:key=value"),
            ("yoco:window=0", 8, "window=0; use at least 1"),
            ("yoco:window=-4", 8, "window=-4; use at least 1"),
            ("yoco:window=2.5", 8, "option window=2.5; use a whole number or None"),
            ("yoco:own_norm=1", 8, "own_norm=1; use True or False or None"),
            ("window_hybrid:window=0", 16, "layer 0: window=0; use at least 1"),
            ("0s_1:window=0", 2, "layer 0: window=0; use at least 1"),
            ("0_1:passes=7", 2, "window=1024,passes=7"),
            (None, 4, "layout=None; use text"),
            ("mha", "4", "num_layers='4'; use a whole number"),
            ("mha", True, "num_layers=True; use a whole number"),
        ],
    )
    def test_named(self, spec, num_layers, message):
        with pytest.raises(LayoutError, match=message):
            layouts.resolve(spec, num_layers)

    @pytest.mark.parametrize(
        ("stream", "message"),
        [
            (Stream(), "no projection and no source"),
            (Stream(sources=(0, 1)), "2 sources but no weights"),
            (Stream(own=True, weights="head"), "weights on its own projection alone"),
            (reuse(2), "source 2 is the layer itself"),
            (reuse(3), "source 3 does not cache its values"),
            (Stream(own=True, sources=(0,)), "cached, but no attention reads it"),
            (
                Stream(sources=(0,), weights="scalar", mixing=Mixing(parameterization="convex")),
                "convex weights are for an own projection",
            ),
            (
                Stream(sources=(0,), weights="scalar", mixing=Mixing(init="own")),
                "init='own' needs an own projection",
            ),
            (
                Stream(sources=(0,), weights="scalar", mixing=Mixing(init="recursive", anchor=1)),
                "the recursion needs sources only, and an anchor among them",
            ),
        ],
    )
    def test_streams(self, stream, message):
        ordinary = LayerKV(OWN, OWN)
        with pytest.raises(LayoutError, match=f"layer 2, values: .*{message}"):
            KVLayout((ordinary, ordinary, LayerKV(OWN, stream), LayerKV(OWN, reuse(0))))

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: Stream(sources=[0]), r"sources=\[0\]; use a tuple of whole numbers"),
            (lambda: Stream(sources=(0.5,)), r"sources=\(0.5,\); use a tuple of whole numbers"),
            (lambda: Stream(own=1), "own=1; use True or False"),
            (lambda: Stream(weights="row"), "weights='row'; use scalar, head, channel"),
            (lambda: Mixing(scale=0), "scale=0; use a number above 0"),
            (lambda: Mixing(init="zeros"), "init='zeros'; choose normal, fan_in"),
            (lambda: Mixing(anchor=0.5), "anchor=0.5; use a whole number"),
            (lambda: LayerKV(OWN, OWN, window=2.5), "window=2.5; use a whole number or None"),
            (lambda: LayerKV(OWN, 3), "value=3; use a Stream"),
            (lambda: KVLayout([LayerKV(OWN, OWN)]), "use a tuple of LayerKVs"),
            (
                lambda: KVLayout((LayerKV(OWN, OWN),), passes=(1.5, 2)),
                r"passes=\(1.5, 2\); use a tuple of 2 whole numbers",
            ),
            (lambda: KVLayout.from_dict({"layer": []}), "unknown field layer; did you mean layers"),
            (
                lambda: KVLayout.from_dict({"layers": [{"key": {"owns": True}}]}),
                "unknown field layers.0.key.owns; did you mean own",
            ),
            (lambda: KVLayout.from_dict(5), "layout=5; use fields by name"),
            (lambda: KVLayout.from_dict({"layers": 3}), "layers=3; use a list with the fields of"),
            (lambda: KVLayout.from_dict({"layers": "ab"}), "layers='ab'; use a list"),
            (lambda: KVLayout.from_dict({"layers": ["a"]}), "layers.0='a'; use fields by name"),
            (
                lambda: ModelConfig.from_dict(
                    dict(vocab_size=9, num_layers=1, d_model=8, num_heads=2, d_ff=8)
                    | {"layout": {"layers": [3]}}
                ),
                "layers.0=3; use fields by name",
            ),
            (lambda: layouts.parse("0_1", window=1.5), "window=1.5; use a whole number"),
        ],
    )
    def test_values_of_the_wrong_type(self, build, message):
        with pytest.raises(LayoutError, match=message):
            build()

    def test_a_norm_for_no_projection(self):
        with pytest.raises(LayoutError, match="layer 1: kv_norm without a projection"):
            KVLayout((LayerKV(OWN, OWN), LayerKV(reuse(0), reuse(0), kv_norm=True)))
