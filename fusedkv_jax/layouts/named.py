"""Every named layout, as a function of the number of layers. Adding one is one function here.

Unless said otherwise the first `split` layers (default: half) are ordinary and the layers above
them cache nothing; `mid = split - 1` is the highest ordinary layer. The field's papers count layers
from 1; here they count from 0.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Literal

from fusedkv_jax.layouts import grammar
from fusedkv_jax.layouts.algebra import (
    OWN,
    Granularity,
    Init,
    KVLayout,
    LayerKV,
    LayoutError,
    Mixing,
    Stream,
    reuse,
)
from fusedkv_jax.layouts.grammar import Recursion, fused
from fusedkv_jax.validation import check_type, nearest_or_all

_REGISTRY: dict[str, Callable[..., KVLayout]] = {}
# Head geometries: every layer owns its streams, and how many heads there are is set elsewhere.
_GEOMETRIES = ("gqa", "mqa", "mla")

_ORDINARY = LayerKV(OWN, OWN)


def register(function: Callable[..., KVLayout]) -> Callable[..., KVLayout]:
    """Add a layout function `f(num_layers, **options) -> KVLayout` to the table, by its name.

    Outside of this package (in a file of --config, say) the name is for the programs that run it;
    what they save has the layout itself.

    Raises:
        LayoutError: there is another one of this name.
    """
    name = function.__name__
    known = _REGISTRY.get("mha" if name in _GEOMETRIES else name)
    if known is not None and known.__module__ != function.__module__:
        raise LayoutError(f"there is a layout {name!r} already; choose another name")
    _REGISTRY[name] = function
    return function


def _half(num_layers: int, split: int | None, at_least: int = 1) -> int:
    if split is None:
        if num_layers % 2:
            raise LayoutError(
                f"num_layers={num_layers} is odd; give split=, the number of caching layers"
            )
        split = num_layers // 2
    if not at_least <= split <= num_layers:
        raise LayoutError(f"split={split}; use {at_least} to num_layers={num_layers}")
    return split


def _stack(num_layers: int, split: int, upper: LayerKV) -> tuple[LayerKV, ...]:
    return (_ORDINARY,) * split + (upper,) * (num_layers - split)


def _layers(sources: int | tuple[int, ...] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    if sources is None:
        return default
    return (sources,) if isinstance(sources, int) else tuple(sources)


@register
def mha(num_layers: int) -> KVLayout:
    """Every layer caches its own keys and values (MHA, GQA, MQA and MLA alike)."""
    return KVLayout((_ORDINARY,) * num_layers)


@register
def cla(num_layers: int, k: int = 2) -> KVLayout:
    """Cross-layer attention: groups of k layers share the first one's KV (arXiv 2405.12981)."""
    most = max(num_layers, 2)  # the default serves a model of one layer, too
    if not 1 <= k <= most:
        raise LayoutError(f"k={k}; use 1 to num_layers={most}")
    return _nearest_below(num_layers, set(range(0, num_layers, k)))


@register
def mlkv(num_layers: int, m: int | None = None) -> KVLayout:
    """m layers own KV, all others read the nearest one below (MLKV, arXiv 2406.09297)."""
    m = max(num_layers // 2, 1) if m is None else m
    if not 1 <= m <= num_layers:
        raise LayoutError(f"m={m}; use 1 to num_layers={num_layers}")
    return _nearest_below(num_layers, {0} | {(i + 1) * num_layers // m for i in range(m - 1)})


def _nearest_below(num_layers: int, owners: set[int]) -> KVLayout:
    layers = []
    for i in range(num_layers):
        source = max(j for j in owners if j <= i)
        layers.append(_ORDINARY if i == source else LayerKV(reuse(source), reuse(source)))
    return KVLayout(tuple(layers))


@register
def yoco(
    num_layers: int,
    split: int | None = None,
    window: int | None = None,
    own_norm: bool | None = None,
) -> KVLayout:
    """You only cache once (arXiv 2405.05254), the upper half reads one layer's keys and values.

    Without a window: YOCO-base, whose upper layers read those of layer mid. With a window, or with
    `own_norm`, the original: the lower half is windowed, and layer `split` computes the shared,
    full-length keys and values from a norm of its own.
    """
    split = _half(num_layers, split)
    if window is not None and window < 1:
        raise LayoutError(f"window={window}; use at least 1, or none")
    if not (window if own_norm is None else own_norm):
        if window:
            raise LayoutError(
                "yoco: a windowed lower half needs own_norm=True, a full shared cache"
            )
        return KVLayout(_stack(num_layers, split, LayerKV(reuse(split - 1), reuse(split - 1))))
    if split >= num_layers:
        raise LayoutError(f"split={split}; the shared cache needs a layer above the lower half")
    lower = (LayerKV(OWN, OWN, window=window),) * split
    shared = LayerKV(OWN, OWN, kv_norm=True)
    upper = (LayerKV(reuse(split), reuse(split)),) * (num_layers - split - 1)
    return KVLayout((*lower, shared, *upper))


@register
def lckv(
    num_layers: int,
    w: int = 2,
    target: Literal["top", "middle", "bottom"] | int = "top",
    forward_passes: int = 7,
    backward_passes: int = 2,
) -> KVLayout:
    """Layer-condensed KV (arXiv 2405.10637): all but w layers read one layer, usually above them.

    Args:
        num_layers: number of layers.
        w: ordinary warm-up layers, half of them at the bottom and half at the top.
        target: `top`, `middle` or `bottom` of the layers between, or a layer number.
        forward_passes: passes without gradient of the parallel form.
        backward_passes: passes with gradient after them.
    """
    bottom, top = (w + 1) // 2, w // 2
    if not 0 <= w < num_layers:
        raise LayoutError(f"w={w}; use 0 to {num_layers - 1}")
    inner = range(bottom, num_layers - top)
    named = {"top": inner[-1], "middle": (inner[0] + inner[-1]) // 2, "bottom": inner[0]}
    source = named.get(target, -1) if isinstance(target, str) else target
    if source not in inner:
        raise LayoutError(
            f"target={target!r}; choose top, middle, bottom or {inner[0]} to {inner[-1]}"
        )
    layers = [_ORDINARY] * num_layers
    for i in inner:
        if i != source:
            layers[i] = LayerKV(reuse(source), reuse(source))
    return KVLayout(tuple(layers), passes=(forward_passes, backward_passes))


@register
def dense_fusion(num_layers: int, split: int | None = None, init: Init = "fan_in") -> KVLayout:
    """The FusedKV paper's pilot: upper layers fuse the streams of all lower ones, with scalars."""
    split = _half(num_layers, split)
    stream = Stream(sources=tuple(range(split)), weights="scalar", mixing=Mixing(init=init))
    return KVLayout(_stack(num_layers, split, LayerKV(stream, stream)))


@register
def fusedkv(
    num_layers: int,
    split: int | None = None,
    key_sources: int | tuple[int, ...] | None = None,
    value_sources: int | tuple[int, ...] | None = None,
    granularity: Granularity = "channel",
    parameterization: Recursion = "equivalent",
) -> KVLayout:
    """FusedKV (arXiv 2512.03870): upper streams are learned fusions of layers 0 and mid.

    With latent attention (MLA) keys and values are one latent, for which the recursion over depth
    has no meaning: choose `parameterization=normal` there.

    Args:
        num_layers: number of layers.
        split: caching layers, default half.
        key_sources: layers whose keys are fused, default (0, mid).
        value_sources: layers whose values are fused, default (0, mid).
        granularity: `channel` (per KV head and channel), `shared_channel`, `head` or `scalar`.
        parameterization: `equivalent`, `iterative` or `normal`, as in the paper.
    """
    split = _half(num_layers, split, at_least=2)
    make = functools.partial(fused, weights=granularity, mixing=parameterization)
    key = make("key", _layers(key_sources, (0, split - 1)))
    value = make("value", _layers(value_sources, (0, split - 1)))
    return KVLayout(_stack(num_layers, split, LayerKV(key, value)))


@register
def fusedkv_lite(
    num_layers: int,
    split: int | None = None,
    key_source: int | None = None,
    value_source: int = 0,
) -> KVLayout:
    """FusedKV-Lite (arXiv 2512.03870): upper layers read layer mid's keys and layer 0's values."""
    split = _half(num_layers, split, at_least=2)
    key_source = split - 1 if key_source is None else key_source
    return KVLayout(_stack(num_layers, split, LayerKV(reuse(key_source), reuse(value_source))))


@register
def lite_learnable(num_layers: int, split: int | None = None, init: Init = "ones") -> KVLayout:
    """FusedKV-Lite with learned channel weights on the two reused streams."""
    split = _half(num_layers, split, at_least=2)
    key, value = (
        Stream(sources=(source,), weights="channel", mixing=Mixing(init=init))
        for source in (split - 1, 0)
    )
    return KVLayout(_stack(num_layers, split, LayerKV(key, value)))


@register
def lite_reversed(num_layers: int, split: int | None = None) -> KVLayout:
    """The paper's ablation of Lite: the lowest layer's keys and the middle layer's values."""
    split = _half(num_layers, split, at_least=2)
    return KVLayout(_stack(num_layers, split, LayerKV(reuse(0), reuse(split - 1))))


@register
def yoco_pp(num_layers: int, split: int | None = None, scale: float = 35.0) -> KVLayout:
    """YOCO++: caching layers add a learned residual of layer 0; upper layers read layer mid."""
    split = _half(num_layers, split, at_least=2)
    residual = Stream(
        own=True, sources=(0,), weights="scalar", mixing=Mixing(init="own", scale=scale)
    )
    upper = LayerKV(reuse(split - 1), reuse(split - 1))
    layers = (
        _ORDINARY,
        *[LayerKV(residual, residual)] * (split - 1),
        *[upper] * (num_layers - split),
    )
    return KVLayout(layers)


@register
def svformer(num_layers: int) -> KVLayout:
    """Every layer has its own keys and reads layer 0's values (arXiv 2410.17897)."""
    return KVLayout((_ORDINARY, *[LayerKV(OWN, reuse(0))] * (num_layers - 1)))


@register
def svformer_half(num_layers: int) -> KVLayout:
    """SVFormer whose layer 1 reads layer 0's keys, too: half of the cache with any depth.

    Found by this project's search for layouts that look things up (docs/study.md).
    """
    shared = LayerKV(reuse(0), reuse(0))
    layers = (_ORDINARY, shared, *[LayerKV(OWN, reuse(0))] * (num_layers - 2))
    return KVLayout(layers[:num_layers])


@register
def resformer(num_layers: int) -> KVLayout:
    """Values are a learned convex mix of the layer's own and layer 0's (arXiv 2410.17897)."""
    value = Stream(
        own=True,
        sources=(0,),
        weights="scalar",
        mixing=Mixing(init="even", parameterization="convex"),
    )
    return KVLayout((_ORDINARY, *[LayerKV(OWN, value)] * (num_layers - 1)))


@register
def window_hybrid(
    num_layers: int,
    window: int = 512,
    full_every: int = 4,
    upper: Literal["fusedkv", "fusedkv_lite", "mha"] = "fusedkv",
    rebuild: Literal["all", "window"] = "all",
    split: int | None = None,
) -> KVLayout:
    """Sliding-window and full layers in turn; upper layers rebuild from sources of their own type.

    Args:
        num_layers: number of layers.
        window: width in tokens of the windowed layers.
        full_every: every full_every-th layer attends to everything.
        upper: `fusedkv`, `fusedkv_lite` or `mha` (nothing is rebuilt).
        rebuild: `all` upper layers (+WF in the paper), or the `window` ones only (+W).
        split: caching layers, default half.
    """
    split = _half(num_layers, split, at_least=2)
    if full_every < 1:
        raise LayoutError(f"full_every={full_every}; use at least 1")
    widths = [None if (i + 1) % full_every == 0 else window for i in range(num_layers)]
    layers = []
    for i, width in enumerate(widths):
        key = value = OWN
        if i >= split and upper != "mha" and (rebuild == "all" or width):
            same = [j for j in range(split) if widths[j] == width]
            if len(same) < 2:
                raise LayoutError(
                    f"layer {i} needs two layers of its type below split={split} to rebuild from;"
                    " lower full_every or raise split"
                )
            low, mid = same[0], same[-1]
            if upper == "fusedkv":
                key, value = fused("key", (low, mid)), fused("value", (low, mid))
            else:
                key, value = reuse(mid), reuse(low)
        layers.append(LayerKV(key, value, window=width))
    return KVLayout(tuple(layers))


def names() -> tuple[str, ...]:
    """The registered layouts."""
    return tuple(_REGISTRY)


def get(name: str, num_layers: int, **options: object) -> KVLayout:
    """Build a named layout.

    `gqa`, `mqa` and `mla` give the layout of `mha`: as head geometries they are set in
    `ModelConfig`.

    Args:
        name: one of `names()`.
        num_layers: number of layers.
        **options: of that layout's function in `fusedkv_jax.layouts.named`.

    Raises:
        LayoutError: unknown name or option (the nearest are suggested), or a refused layout.
    """
    return _build(name, num_layers, options)


def _build(name: str, num_layers: int, options: dict[str, object]) -> KVLayout:
    """`get` with the options of a text, which may have the names of its own arguments."""
    check_type("name", name, str, LayoutError)
    function = _REGISTRY.get("mha" if name in _GEOMETRIES else name)
    if function is None:
        raise LayoutError(f"unknown layout {name!r}{nearest_or_all(name, _REGISTRY)}")
    hints = typing.get_type_hints(function)
    known = list(inspect.signature(function).parameters)[1:]
    for option, value in options.items():
        if option not in known:
            raise LayoutError(
                f"layout {name!r} has no option {option!r}{nearest_or_all(option, known)}"
            )
        value = tuple(value) if isinstance(value, list) else value
        hint = hints.get(option, typing.Any)
        check_type(f"layout {name!r}, option {option}", value, hint, LayoutError)
        options[option] = value
    _check_depth(num_layers)
    layout = function(num_layers, **options)
    if not isinstance(layout, KVLayout) or layout.num_layers != num_layers:
        found = f"{layout.num_layers} layers" if isinstance(layout, KVLayout) else repr(layout)
        raise LayoutError(
            f"the function of layout {name!r} gave {found}; return a KVLayout of"
            f" num_layers={num_layers} layers"
        )
    text = ",".join(f"{key}={_text(value)}" for key, value in options.items())
    return dataclasses.replace(layout, spec=f"{name}:{text}" if text else name)


def has_name(layout: KVLayout) -> bool:
    """Whether its `spec` stands for it in every program.

    A name that somebody else has registered is known in their own programs alone.
    """
    name = layout.spec.partition(":")[0]
    function = _REGISTRY.get(name)
    if function is not None and function.__module__ != __name__:
        return False
    try:
        return bool(layout.spec) and resolve(layout.spec, layout.num_layers) == layout
    except LayoutError:  # it was registered where the layout was made
        return False


def ordinary(num_layers: int) -> KVLayout:
    """The layout that others are compared with: every layer caches its own keys and values."""
    return get("mha", num_layers)


def resolve(spec: str, num_layers: int) -> KVLayout:
    """Build a layout from text: `fusedkv`, `cla:k=3`, or the grammar of `parse`.

    Raises:
        LayoutError: the text is neither, or its number of layers differs.
    """
    check_type("layout", spec, str, LayoutError)
    _check_depth(num_layers)
    name, colon, text = spec.partition(":")
    options: dict[str, object] = {}
    for part in text.split(",") if colon else ():
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not option or not equals or not value:
            raise LayoutError(f"layout {spec!r}: write options as name:key=value,key=value")
        if option in options:
            raise LayoutError(f"layout {spec!r} sets {option} twice; keep one")
        options[option] = _value(value)
    if name not in _REGISTRY and any(c.isdigit() for c in name[:2]):
        return _resolve_grammar(name, num_layers, options)
    return _build(name, num_layers, options)


MAX_LAYERS = 10_000  # more is a slip of the hand, and takes minutes to describe


def _check_depth(num_layers: int) -> None:
    check_type("num_layers", num_layers, int, LayoutError)
    if num_layers < 1:
        raise LayoutError(f"num_layers={num_layers}; use at least 1")
    if num_layers > MAX_LAYERS:
        raise LayoutError(f"num_layers={num_layers}; use at most {MAX_LAYERS:,}")


def _resolve_grammar(text: str, num_layers: int, options: dict) -> KVLayout:
    for option in options:
        if option not in ("window", "passes"):
            raise LayoutError(f"layout {text!r} has no option {option!r}; choose window, passes")
    window, passes = options.get("window", 1), options.get("passes", (0, 1))
    if type(window) is not int or type(passes) is not tuple or len(passes) != 2:
        raise LayoutError(f"layout {text!r}: write options as window=1024,passes=7+2")
    layout = grammar.parse(text, **options)
    if layout.num_layers != num_layers:
        raise LayoutError(
            f"layout {text!r} has {layout.num_layers} layers but num_layers={num_layers}"
        )
    return layout


def _value(text: str) -> int | float | bool | str | None | tuple[int, ...]:
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    if "+" in text and all(part.isdecimal() for part in text.split("+")):
        return tuple(int(part) for part in text.split("+"))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _text(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
