"""The layer-types grammar: a layout as one short string, such as `0_1_2_3_f0+3x4`.

Tokens joined by `_`, one a layer: a target, then optionally `s` or `sW` (sliding window of W
tokens), then optionally `xR` (repeat R times). A target is `INT` (keys and values of that layer),
`kINTvINT` (keys of one, values of another) or `fINT+INT+...` (learned fusion, per channel). A layer
owns its keys iff some layer's keys come from it, and its values likewise; so a layer that names
itself is an ordinary one. The notation extends that of the LCKV code base (arXiv 2410.14442).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from fusedkv_jax.layouts.algebra import (
    KINDS,
    OWN,
    Granularity,
    Kind,
    KVLayout,
    LayerKV,
    LayoutError,
    Mixing,
    Stream,
)
from fusedkv_jax.validation import check_type

Recursion = Literal["equivalent", "iterative", "normal"]

DEFAULT_WINDOW = 1024
DEFAULT_PASSES = (7, 2)

_TOKEN = re.compile(
    r"(?:k(?P<key>\d+)v(?P<value>\d+)|f(?P<fuse>\d+(?:\+\d+)+)|(?P<both>\d+))"
    r"(?P<window>s(?P<width>\d+)?)?(?:x(?P<repeat>[1-9]\d{0,3}))?"
)


@dataclass(frozen=True)
class _Token:
    key: tuple[int, ...]
    value: tuple[int, ...]
    window: int | None


def fused(
    kind: Kind,
    sources: tuple[int, ...],
    *,
    weights: Granularity = "channel",
    mixing: Recursion = "equivalent",
) -> Stream:
    """A learned fusion of cached streams with FusedKV's parameterization (arXiv 2512.03870).

    The recursion over depth adds its fresh term to the highest source for keys and to the lowest
    for values, so that deep layers lean on the middle layer's keys and the lowest layer's values.

    Args:
        kind: "key" or "value".
        sources: layers whose streams are fused, in ascending order.
        weights: granularity of the weights.
        mixing: `equivalent` (recursion at initialization, direct weights after), `iterative`
            (recursion always) or `normal` (independent N(0, 1)).
    """
    if list(sources) != sorted(set(sources)):
        raise LayoutError(f"fused sources {sources} must ascend without repeating")
    anchor = len(sources) - 1 if kind == "key" else 0
    choices = {
        "equivalent": Mixing(init="recursive", anchor=anchor),
        "iterative": Mixing(init="normal", parameterization="iterative", anchor=anchor),
        "normal": Mixing(init="normal", anchor=anchor),
    }
    check_type("mixing", mixing, Recursion, LayoutError)
    return Stream(sources=tuple(sources), weights=weights, mixing=choices[mixing])


def parse(
    text: str, *, window: int = DEFAULT_WINDOW, passes: tuple[int, int] = DEFAULT_PASSES
) -> KVLayout:
    """Read a layout from the layer-types grammar.

    Args:
        text: for example `0_1_2_3_f0+3x4`, `0_20x20_21`, `0s512_1s512_1x2`.
        window: width in tokens of an `s` without a number.
        passes: (without, with gradient) passes of a cyclic layout.

    Raises:
        LayoutError: a token that the grammar does not know, or a layout that makes no sense.
    """
    check_type("layer_types", text, str, LayoutError)
    check_type("window", window, int, LayoutError)
    check_type("passes", passes, tuple[int, int], LayoutError)
    tokens = [token for part in text.split("_") for token in _expand(part, text, window)]
    owners = {kind: {j for token in tokens for j in getattr(token, kind)} for kind in KINDS}
    layers = tuple(
        LayerKV(
            key=_stream("key", i, token.key, owners["key"]),
            value=_stream("value", i, token.value, owners["value"]),
            window=token.window,
        )
        for i, token in enumerate(tokens)
    )
    spec = text
    if (window, passes) != (DEFAULT_WINDOW, DEFAULT_PASSES):
        spec += f":window={window},passes={passes[0]}+{passes[1]}"
    return KVLayout(layers, passes=passes, spec=spec)


def _expand(part: str, text: str, window: int) -> list[_Token]:
    match = _TOKEN.fullmatch(part)
    if match is None:
        raise LayoutError(
            f"layer_types {text!r}: cannot read {part!r}; a token is INT, kINTvINT or fINT+INT,"
            " then s or sWIDTH for a window, then xCOUNT to repeat"
        )
    if match["fuse"]:
        key = value = tuple(int(j) for j in match["fuse"].split("+"))
    elif match["both"]:
        key = value = (int(match["both"]),)
    else:
        key, value = (int(match["key"]),), (int(match["value"]),)
    width = int(match["width"] or window) if match["window"] else None
    return [_Token(key, value, width)] * int(match["repeat"] or 1)


def _stream(kind: Kind, layer: int, sources: tuple[int, ...], owners: set[int]) -> Stream:
    if len(sources) > 1 and layer in owners:
        raise LayoutError(f"layer {layer}, {kind}s: fused, so no layer can read them")
    if len(sources) > 1:
        return fused(kind, sources)
    if sources == (layer,):
        return OWN
    return Stream(own=layer in owners, sources=sources)


def format(layout: KVLayout) -> str:
    """Write a layout in the grammar; `resolve` reads it again, and gives an equal layout.

    `parse` does, too, if the layout has the default passes; others follow the tokens as an option,
    such as `0_6x6_7:passes=3+1`.

    Raises:
        LayoutError: the layout uses what the grammar cannot say (residuals, other weights, norms).
    """
    tokens = [_format_layer(i, layer) for i, layer in enumerate(layout.layers)]
    text, start = [], 0
    for i in range(1, len(tokens) + 1):
        if i == len(tokens) or tokens[i] != tokens[start]:
            text.append(tokens[start] + (f"x{i - start}" if i - start > 1 else ""))
            start = i
    result = "_".join(text)
    if parse(result, passes=layout.passes) != layout:
        raise LayoutError("this layout has parts that the layer-types grammar cannot express")
    if layout.passes != DEFAULT_PASSES:
        result += f":passes={layout.passes[0]}+{layout.passes[1]}"
    return result


def _format_layer(i: int, layer: LayerKV) -> str:
    key, value = ((i,) if s.reads_self else s.sources for s in (layer.key, layer.value))
    keys, values = ("+".join(map(str, layers)) for layers in (key, value))
    if "+" in keys + values:
        target = f"f{keys}"
    else:
        target = keys if keys == values else f"k{keys}v{values}"
    return target + (f"s{layer.window}" if layer.window else "")
