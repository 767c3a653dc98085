"""The recipe's decoder in PyTorch, written from the papers; it shares nothing with the library.

Pre-norm layers with RMSNorm (arXiv 1910.07467), also on queries and keys, rotary embedding
(arXiv 2104.09864, halves), SwiGLU (arXiv 2002.05202), and one matrix as embedding and head. A layer
owns its keys and values, reads those of other layers, or fuses them (FusedKV, arXiv 2512.03870).
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

EPS = 1e-6
THETA = 10_000.0


@dataclasses.dataclass(frozen=True)
class Reads:
    """Whose keys and values a layer attends to; one that names itself has projections of its own.

    Sources that are fused have a learned weight for each head and channel (for each rotated
    pair of channels, with keys), or for each head. A window is the number of latest tokens that
    are seen.
    """

    keys: tuple[int, ...]
    values: tuple[int, ...]
    fused: bool = False
    by_head: bool = False
    window: int | None = None


def reads(layout: str, depth: int) -> tuple[Reads, ...]:
    """The layers of a layout: a name, half of the layers below the middle, or one token a layer.

    Tokens are joined by `_`: `3` reads keys and values of layer 3, `k1v0` keys of layer 1 and
    values of layer 0, `f0+1` fuses those of both (the notation of arXiv 2410.14442, extended); `s8`
    after it is a window of 8 tokens. `fusedkv:value_sources=0` weighs the values of layer 0 alone,
    and `fusedkv:granularity=head` has a weight for each head instead of each channel.

    Raises:
      ValueError: an unknown name, or another number of tokens.
    """
    mid = depth // 2 - 1
    upper = {
        "fusedkv": f"f0+{mid}",  # arXiv 2512.03870
        "fusedkv_lite": f"k{mid}v0",  # the same
        "lite_reversed": f"k0v{mid}",
        "yoco": f"{mid}",  # what YOCO shares (arXiv 2405.05254), without its windows
    }
    own = [f"{i}" for i in range(depth)]
    whole = {
        "mha": own,
        "cla": [own[i // 2 * 2] for i in range(depth)],  # arXiv 2405.12981
        "svformer": [f"k{i}v0" for i in range(depth)],  # arXiv 2410.17897
    }
    name, colon, options = layout.partition(":")
    if name == "fusedkv" and colon:
        sources: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("key_sources", "value_sources"), (0, mid)
        )
        by_head = False
        for option in options.split(","):
            kind, _, value = option.partition("=")
            if kind in sources:
                sources[kind] = tuple(map(int, value.split("+")))
            elif option == "granularity=head":
                by_head = True
            else:
                known = " and ".join([*sources, "granularity=head"])
                raise ValueError(f"layout={layout}; use the options {known}")
        top = Reads(*sources.values(), fused=True, by_head=by_head)
        below = [Reads((i,), (i,)) for i in range(depth // 2)]
        return (*below, *[top] * (depth - len(below)))
    if layout in upper:
        tokens = [*own[: depth // 2], *[upper[layout]] * (depth - depth // 2)]
    else:
        tokens = whole.get(layout) or layout.split("_")
    if len(tokens) != depth:
        raise ValueError(f"layout={layout}; use {', '.join([*upper, *whole])} or {depth} tokens")
    return tuple(map(_read, tokens))


def _read(token: str) -> Reads:
    found = re.fullmatch(r"(?:f(\d+)\+(\d+)|k(\d+)v(\d+)|(\d+))(?:s(\d+))?", token)
    if found is None:
        raise ValueError(f"{token!r} is no layer; write 0, k1v0 or f0+1, and s8 for a window of 8")
    low, high, key, value, both, width = found.groups()
    window = int(width) if width else None
    if high is not None:
        sources = int(low), int(high)
        return Reads(sources, sources, fused=True, window=window)
    return Reads((int(key or both),), (int(value or both),), window=window)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder, and the spread of its initial matrices.

    Attributes:
      kv_heads: heads of keys and values, each for as many neighboring query heads.
      qk_norm: queries and keys are normed.
      embedding_scale: multiplies what enters the first layer.
    """

    vocabulary: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    init_std: float
    layers: tuple[Reads, ...]
    qk_norm: bool = True
    embedding_scale: float = 1.0


class Layer(nn.Module):
    """The parameters of one layer; `Recall.forward` is what happens to them."""

    def __init__(self, shape: Shape, number: int, draws: torch.Generator):
        super().__init__()
        width, heads, size = shape.width, shape.heads, shape.width // shape.heads
        own, kv_heads = shape.layers[number], shape.kv_heads

        def matrix(*sizes: int) -> nn.Parameter:
            return nn.Parameter(shape.init_std * torch.randn(*sizes, generator=draws))

        def scale(size: int) -> nn.Parameter:
            return nn.Parameter(torch.ones(size))

        self.attention_norm, self.mlp_norm = scale(width), scale(width)
        self.q_proj, self.o_proj = matrix(width, heads, size), matrix(heads, size, width)
        self.q_norm = scale(size) if shape.qk_norm else None
        if number in {j for layer in shape.layers for j in layer.keys}:
            self.k_proj = matrix(width, kv_heads, size)
            self.k_norm = scale(size) if shape.qk_norm else None
        if number in {j for layer in shape.layers for j in layer.values}:
            self.v_proj = matrix(width, kv_heads, size)
        self.gate, self.up = matrix(width, shape.hidden), matrix(width, shape.hidden)
        self.down = matrix(shape.hidden, width)
        if own.fused:
            pairs, channels = (1, 1) if own.by_head else (size // 2, size)
            self.key_weights = nn.Parameter(torch.empty(len(own.keys), kv_heads, pairs))
            self.value_weights = nn.Parameter(torch.empty(len(own.values), kv_heads, channels))


class Recall(nn.Module):
    """The decoder. `decayed` and `kept` are its parameters with and without weight decay."""

    def __init__(self, shape: Shape, seed: int):
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.shape = shape
        size = (shape.vocabulary, shape.width)
        self.embedding = nn.Parameter(shape.init_std * torch.randn(*size, generator=draws))
        self.final_norm = nn.Parameter(torch.ones(shape.width))
        self.layers = nn.ModuleList([Layer(shape, i, draws) for i in range(len(shape.layers))])
        for name, fresh in (("key_weights", -1), ("value_weights", 0)):
            fused = [getattr(layer, name) for layer in self.layers if hasattr(layer, name)]
            draw_recursively(fused, fresh, draws)

    def decayed(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if not _is_kept(name)]

    def kept(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if _is_kept(name)]

    def forward(
        self, tokens: Tensor, sizes: Sequence[int], seen: list[Tensor] | None = None
    ) -> list[Tensor]:
        """What each layer gives, before the final norm, [B, T, D] each.

        Args:
          tokens: [B, T] ids.
          sizes: row b holds documents of sizes[b] tokens, end to end; nothing sees another one.
          seen: takes the attention of each layer [B, N, T, T], for rows of one document.
        """
        angles = _angles(tokens.shape, sizes, self.shape.width // self.shape.heads)
        x = self.shape.embedding_scale * self.embedding[tokens]
        keys, values, outputs = {}, {}, []
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            own = self.shape.layers[number]
            normed = rms_norm(x, layer.attention_norm)
            q = _rotated(_heads(normed, layer.q_proj, layer.q_norm), angles)
            if hasattr(layer, "k_proj"):
                keys[number] = _rotated(_heads(normed, layer.k_proj, layer.k_norm), angles)
            if hasattr(layer, "v_proj"):
                values[number] = _heads(normed, layer.v_proj, None)
            k = _fused([keys[j] for j in own.keys], getattr(layer, "key_weights", None))
            v = _fused([values[j] for j in own.values], getattr(layer, "value_weights", None))
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
            if seen is not None:
                seen.append(attention_weights(q, k, own.window))
            x = x + attend(q, k, v, sizes, own.window).flatten(2) @ layer.o_proj.flatten(0, 1)
            normed = rms_norm(x, layer.mlp_norm)
            x = x + (nn.functional.silu(normed @ layer.gate) * (normed @ layer.up)) @ layer.down
            outputs.append(x)
        return outputs

    def logits(self, x: Tensor) -> Tensor:
        """Next-token logits [..., V] from what a layer gave, the last or one that exits early."""
        return rms_norm(x, self.final_norm) @ self.embedding.T


def _is_kept(name: str) -> bool:
    return name.endswith(("norm", "_weights"))


def draw_recursively(fused: list[Tensor], fresh: int, draws: torch.Generator) -> None:
    """Initial fusion weights [J, ...] of the fusing layers, from the lowest on.

    The paper's recursion: a layer rescales the fusion of the one below it by p and adds r to the
    weight of the source `fresh`; all p, r and the first layer's weights are N(0, 1) per channel.
    """
    with torch.no_grad():
        for number, weights in enumerate(fused):
            drawn = torch.randn(weights.shape, generator=draws)
            if number == 0 or len(weights) == 1:  # one source has nothing to be fused with
                weights.copy_(drawn)
                continue
            fresh %= len(weights)
            weights.copy_(drawn[0 if fresh else 1] * fused[number - 1])
            weights[fresh] += drawn[fresh]


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * scale


def _heads(x: Tensor, weight: Tensor, norm: Tensor | None) -> Tensor:
    """[B, T, D] through a projection [D, N, H], and a norm over each head."""
    heads = (x @ weight.flatten(1)).unflatten(-1, weight.shape[1:])
    return heads if norm is None else rms_norm(heads, norm)


def _angles(shape: Sequence[int], sizes: Sequence[int], channels: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, 1, H/2]; positions begin anew with each document."""
    places = torch.arange(shape[1]) % torch.tensor(sizes)[:, None]
    speeds = THETA ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angles = places[:, :, None, None] * speeds
    return angles.cos().float(), angles.sin().float()


def _rotated(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    (cos, sin), (a, b) = angles, x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _fused(streams: list[Tensor], weights: Tensor | None) -> Tensor:
    """One stream as it is; several [B, T, N, H] as their weighted sum."""
    if weights is None:
        return streams[0]
    whole = streams[0].shape[-1] // weights.shape[-1]  # 2 for keys, whose halves share weights
    return sum(w.repeat(1, whole) * x for w, x in zip(weights, streams, strict=True))  # type: ignore[return-value]


def attend(
    q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[int], window: int | None = None
) -> Tensor:
    """Causal attention [B, T, N, H] within documents, to the latest `window` tokens or to all."""
    rows = []
    for row, size in enumerate(sizes):
        narrow = window is not None and window < size
        mask: dict = {"attn_mask": _visible(size, window)} if narrow else {"is_causal": True}
        queries, keys, values = (x[row].unflatten(0, (-1, size)).transpose(1, 2) for x in (q, k, v))
        found = nn.functional.scaled_dot_product_attention(queries, keys, values, **mask)
        rows.append(found.transpose(1, 2).flatten(0, 1))
    return torch.stack(rows)


def attention_weights(q: Tensor, k: Tensor, window: int | None = None) -> Tensor:
    """What each query [B, T, N, H] sees of each key of its row, [B, N, T, T]."""
    scores = torch.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~_visible(q.shape[1], window), -torch.inf).softmax(-1)


def _visible(size: int, window: int | None) -> Tensor:
    """Which keys [T, T] the query of each row sees: its own token and those before."""
    ahead = torch.arange(size) - torch.arange(size)[:, None]
    return (ahead <= 0) & (ahead > -(window or size))
