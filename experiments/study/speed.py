"""The third axis: what each row of a study would cost to serve, beside its loss.

Time to the first token and for each later one are rooflines: the larger of FLOPs over peak and
bytes over bandwidth, by the formulas of `fusedkv_jax.costs`. Nothing is run. Kernels come near to
the second where reading is all they wait for; no program reaches the first.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import experiments
from experiments.study import tables
from experiments.study.grid import Row, Study
from experiments.study.statistics import Line
from fusedkv_jax import costs, presets
from fusedkv_jax.config import ModelConfig
from pallas_kernels.devices import CHIPS, Chip

PRESET, CHIP, ROWS, LENGTH = "1_5b", "v5p", 8, 32_768
_DTYPE, _ITEM = "bfloat16", 2
_CPU = pathlib.Path(experiments.__file__).parent / "results" / "benchmark_cpu.json"


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds of one model.

    Attributes:
      first: of one prompt, to its first token.
      later: for a token of each row of a batch whose prompts are in the cache.
    """

    first: float
    later: float

    def of(self, other: "Speed") -> "Speed":
        """As shares of another's."""
        return Speed(self.first / other.first, self.later / other.later)


def roofline(config: ModelConfig, chip: Chip, rows: int, length: int) -> Speed:
    """The least time on one device, its parameters and cache in bfloat16.

    Args:
      config: the model.
      chip: the device.
      rows: sequences that are decoded together; prompts are computed one at a time.
      length: tokens of each.
    """
    weights = _ITEM * costs.parameter_count(config)
    prompt = weights + length * costs.cache_bytes_per_token(config, _DTYPE)
    first = max(costs.prefill_flops(config, length) / chip.flops, prompt / chip.hbm_bandwidth)
    read = weights + rows * costs.decode_cache_reads(config, length, _DTYPE)
    flops = rows * costs.decode_flops(config, length)
    return Speed(first, max(flops / chip.flops, read / chip.hbm_bandwidth))


def estimates(rows: Mapping[str, Row]) -> dict[str, Speed]:
    """Of the layout of each row in a model of useful size."""
    model = presets.get(PRESET, layout="mha")
    return {
        name: roofline(row.apply(model), CHIPS[CHIP], ROWS, LENGTH) for name, row in rows.items()
    }


def measured() -> dict[str, Speed]:
    """Medians on a CPU by layout, from the committed record of the benchmarks."""
    rows = json.loads(_CPU.read_text(encoding="utf-8"))["measurements"]["latency"]["rows"]
    return {row["layout"]: Speed(row["first token s"], row["later token s"]) for row in rows}


def markdown(study: Study, results: Sequence[Line]) -> str:
    """The table of one size; see `chosen`."""
    found, own, cpu = estimates(study.rows), chosen(study, results), measured()
    reference = found[study.reference]
    rows = []
    for line in own:
        share, run = found[line.row].of(reference), cpu.get(line.row)
        ratio = run and run.of(cpu[study.reference])
        rows.append(
            [
                line.row,
                f"{cache_share(line, own, study):.3g}",
                tables.mean(line.loss),
                f"{1e3 * found[line.row].first:,.0f} ({share.first:.2f})",
                f"{1e3 * found[line.row].later:.1f} ({share.later:.2f})",
                f"{ratio.first:.2f}" if ratio else "",
                f"{ratio.later:.2f}" if ratio else "",
            ]
        )
    head = [
        "row",
        f"cache, of {study.reference}'s",
        "loss",
        "first token, ms",
        "later tokens, ms",
        "first token on a CPU",
        "later tokens on a CPU",
    ]
    size = f", {own[0].size}" if own else ""
    return "\n".join(
        [
            f"# Loss, cache and time: {study.name}{size}",
            "",
            "Losses are those of small models. Times are of the same layouts in the preset "
            f"`{PRESET}`, bfloat16, {ROWS} sequences of {LENGTH:,} tokens on one {CHIP} device, by "
            "arithmetic: the larger of FLOPs over peak and bytes over bandwidth, in brackets of "
            f"{study.reference}'s; a first token is that of one prompt, a later one that of every "
            "sequence. The last two columns were measured, as shares of "
            f"{study.reference}'s: 8 layers of width 512, float32, one prompt of 4,096 tokens "
            "([record](../../benchmark_cpu.json)).",
            "",
            *tables.markdown(head, rows),
            "",
        ]
    )


def draw(study: Study, results: Sequence[Line], path: pathlib.Path) -> None:
    """Loss, cache and both times of each row, side by side; crosses were measured on a CPU."""
    from matplotlib.figure import Figure

    found, own, cpu = estimates(study.rows), chosen(study, results), measured()
    places, names = range(len(own)), [line.row for line in own]
    figure = Figure(figsize=(15, 1.6 + 0.35 * len(own)), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    losses, cache, *times = panels
    for place, line in enumerate(own):
        bar = line.loss.half_width or 0.0
        losses.errorbar(line.loss.mean, place, xerr=bar, fmt="o", color="C0", capsize=3)
    losses.set_xlabel("held-out loss (nats per token)")
    cache.barh(places, [cache_share(line, own, study) for line in own], color="C2")
    cache.set_xlabel(f"cache, of {study.reference}'s")
    for axes, part in zip(times, ("first", "later"), strict=True):

        def share(speeds: Mapping[str, Speed], row: str, part: str = part) -> float:
            return getattr(speeds[row].of(speeds[study.reference]), part)

        axes.barh(places, [share(found, name) for name in names], color="C1", alpha=0.7)
        known = [(share(cpu, name), place) for place, name in enumerate(names) if name in cpu]
        axes.plot(*zip(*known, strict=True), "kx", label="CPU, measured")
        axes.axvline(1.0, color="gray", linewidth=1)
        axes.set_xlabel(f"{part} token, of {study.reference}'s ({PRESET} on {CHIP}, roofline)")
        axes.legend(fontsize=8, loc="lower right")
    losses.set_yticks(places, names)
    losses.invert_yaxis()
    for axes in panels:
        axes.grid(alpha=0.3, axis="x", which="both")
    figure.savefig(path, dpi=110)


def cache_share(line: Line, own: Sequence[Line], study: Study) -> float:
    """Cache of a row in the reference's."""
    reference = next(other for other in own if other.row == study.reference)
    return line.record["cache_bytes_per_token"] / reference.record["cache_bytes_per_token"]


def chosen(study: Study, results: Sequence[Line]) -> list[Line]:
    """The lines of the size that has most, the larger of equals; with the reference, or none."""
    sizes = ([line for line in results if line.size == size] for size in reversed([*study.sizes]))
    own = max(sizes, key=len)
    return own if any(line.row == study.reference for line in own) else []
