"""Which layer stores what, where a layer can read one array of keys and values.

With keys sum_j a_j * K_j (a_j per channel), scores are q . sum_j a_j * K_j = sum_j (a_j * q) . K_j:
one dot product of [a_0 * q | a_1 * q | ...] with the record [K_0 | K_1 | ...]. Outputs are weighted
sums of values, P sum_j b_j * V_j = sum_j b_j * (P V_j): attention over [V_0 | V_1 | ...], folded
afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from fusedkv_jax.config import ConfigError, ModelConfig
from fusedkv_jax.layouts import KINDS, Kind, KVLayout
from fusedkv_jax.model.mixing import Weights

_OTHER_SHARING = (
    "tpu-inference lets the last layers read the pages of the last one below them and of no other,"
    " which is not what the layout does; use experiments.serve"
)


@dataclass(frozen=True)
class StoredRecord:
    """What a token leaves in the pages of a layer: streams of `width` heads of H side by side.

    Attributes:
        keys, values: the layers whose streams they are, in order.
    """

    keys: tuple[int, ...]
    values: tuple[int, ...]

    @property
    def width(self) -> int:
        return max(len(self.keys), len(self.values))

    def sources(self, kind: Kind) -> tuple[int, ...]:
        return self.keys if kind == "key" else self.values


@dataclass(frozen=True)
class Fold:
    """How a layout lies in arrays of which each layer reads one.

    Attributes:
        records: what each layer stores; the layers above them store nothing.
        reads: for each layer the one whose pages it reads.
    """

    records: tuple[StoredRecord, ...]
    reads: tuple[int, ...]


def fold(config: ModelConfig) -> Fold:
    """The fold of a model.

    Raises:
        ConfigError: the kernel cannot express it.
    """
    layout = config.kv_layout
    _check(config, layout)
    needed = [{kind: layout.attended(kind, i) for kind in KINDS} for i in range(layout.num_layers)]
    # A record is complete when the last of its sources is there.
    reads = tuple(max(max(sources) for sources in each.values()) for each in needed)
    last = max(reads)
    if reads != (*range(last + 1), *[last] * (layout.num_layers - last - 1)):
        raise ConfigError(_OTHER_SHARING)
    records = []
    for place in range(last + 1):
        wanted = [each for each, read in zip(needed, reads, strict=True) if read == place]
        keys, values = (tuple(sorted({j for each in wanted for j in each[kind]})) for kind in KINDS)
        records.append(StoredRecord(keys, values))
    if any(record.width > 1 for record in records[:last]):
        raise ConfigError(_OTHER_SHARING)
    if last < layout.num_layers - 1 and records[last].width * config.channels == 64:
        raise ConfigError(
            "tpu-inference's kernel for records of 64 channels shares no pages, and"
            f" {records[last].width} heads of {config.channels} side by side are such a record;"
            " use experiments.serve"
        )
    return Fold(tuple(records), reads)


def _check(config: ModelConfig, layout: KVLayout) -> None:
    reasons = {
        "multi-head latent attention": config.mla is not None,
        "a cyclic layout, whose layers read layers above them": layout.is_cyclic,
        "windowed layers": any(layer.window is not None for layer in layout.layers),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"tpu-inference does not serve {reason}; use experiments.serve")


def stored(
    record: StoredRecord, kind: Kind, streams: dict[tuple[Kind, int], Array]
) -> Float[Array, "T K W"]:
    """The streams of new tokens, [1, T, K, H] each, as they lie in the record."""
    parts = [streams[kind, j][0] for j in record.sources(kind)]
    parts += [jnp.zeros_like(parts[0])] * (record.width - len(parts))
    return jnp.concatenate(parts, axis=-1)


def widened(
    q: Float[Array, "T N H"], record: StoredRecord, sources: tuple[int, ...], weights: Array | None
) -> Float[Array, "T N W"]:
    """Queries that see of each source its weighted part: what the sum of sources would give."""
    parts = [jnp.zeros_like(q)] * record.width
    for place, source in enumerate(sources):
        parts[record.keys.index(source)] = _weighted(q, weights, place)
    return jnp.concatenate(parts, axis=-1)


def narrowed(
    out: Float[Array, "T N W"],
    record: StoredRecord,
    sources: tuple[int, ...],
    weights: Array | None,
) -> Float[Array, "T N H"]:
    """What attention over the weighted sum of the values would have given."""
    size = out.shape[-1] // record.width
    parts = []
    for place, source in enumerate(sources):
        start = record.values.index(source) * size
        parts.append(_weighted(out[..., start : start + size], weights, place))
    return sum(parts[1:], start=parts[0])


def _weighted(x: Array, weights: Array | None, place: int) -> Array:
    """x [T, N, H] times the weights [J, K, H] of one source, each for N/K heads."""
    if weights is None:
        return x
    own = jnp.repeat(weights[place], x.shape[1] // weights.shape[1], axis=0)
    return (x.astype(jnp.float32) * own).astype(x.dtype)


def fused_weights(
    layout: KVLayout, weights: Weights, kind: Kind, layer: int
) -> Float[Array, "J K H"] | None:
    """Of what a layer reads; None where it reads one source as it is."""
    return weights[kind, layer] if layout.layers[layer].stream(kind).is_fused else None
