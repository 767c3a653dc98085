"""What a fused stream is made of."""

import dataclasses

from experiments.study.records import Record


@dataclasses.dataclass(frozen=True)
class Share:
    """One fused stream of a layer.

    Attributes:
      layer, kind: of the reader; "key" or "value".
      sources: layers.
      means: weights, each a mean over heads and channels.
      by_weight: root mean squares of the weights, of their sum over sources.
      by_size: the same, each times the root mean square of its source's stream. Streams differ in
        size, and a large weight on a small one brings little. Sources may cancel each other.
    """

    layer: int
    kind: str
    sources: list[int]
    means: list[float]
    by_weight: list[float]
    by_size: list[float]


def shares_of(record: Record) -> list[Share]:
    """The fused streams of a record's model; none of a layout without learned weights."""
    inside = record["inside"]
    found = []
    for weights in inside["weights"]:
        streams = inside["streams"][weights["kind"]]
        sizes = [
            rms * streams[str(source)]
            for rms, source in zip(weights["rms"], weights["sources"], strict=True)
        ]
        found.append(
            Share(
                layer=weights["layer"],
                kind=weights["kind"],
                sources=weights["sources"],
                means=weights["mean"],
                by_weight=_normed(weights["rms"]),
                by_size=_normed(sizes),
            )
        )
    return found


def _normed(values: list[float]) -> list[float]:
    return [value / sum(values) for value in values]
