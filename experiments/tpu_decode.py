"""What a token of decoding moves on TPUs, by layout: tables in docs/guides/tpu_slices.md.

    python -m experiments.tpu_decode

The decode loop is compiled for one host of each chip, four rows of 8192 tokens a device. Results
go to experiments/results/tpu_decode.json as they come, and those that are there already are not
computed again. Needs libtpu and no TPU. Most of what compiling takes is the sampler's sort of the
vocabulary: with 1,024 tokens, the default, a program takes some seconds of a CPU core, with the
paper's 128,000 a minute.
"""

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from experiments.common import cli, pages
from experiments.common.documents import Document, Row
from experiments.common.paper import inference, paper_run
from fusedkv_jax import compile_ahead as ahead
from fusedkv_jax.compile_ahead.chips import Slice
from fusedkv_jax.config import ModelConfig

_ROOT = pathlib.Path(__file__).parents[1]
_MARKS = ("<!-- decoding -->\n", "<!-- end of decoding -->\n")
_ROWS, _LENGTH = 4, 8192  # of a device
_WHOLE = 128_000  # tokens of the paper's vocabulary
_LAYOUTS = ["mha", "gqa", "yoco", "fusedkv", "fusedkv_lite"]

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_list("presets", ["332m", "650m", "1_5b", "4b"], "Sizes.")
    flags.DEFINE_list("layouts", _LAYOUTS, "Layouts; gqa is mha with half as many KV heads.")
    flags.DEFINE_list("chips", ["v6e", "v5p", "v5e", "tpu7x"], "Chips.")
    flags.DEFINE_integer("vocabulary", 1024, "Tokens that the model knows.", lower_bound=128)
    flags.DEFINE_string(
        "results", str(_ROOT / "experiments/results/tpu_decode.json"), "Where results are kept."
    )
    flags.DEFINE_string(
        "document", str(_ROOT / "docs/guides/tpu_slices.md"), "The page whose tables are replaced."
    )


def model(preset: str, layout: str, vocabulary: int) -> ModelConfig:
    """The preset with this layout; `gqa` has two query heads for each KV head."""
    config = paper_run(preset, "mha" if layout == "gqa" else layout).model
    config = config.replace(vocab_size=vocabulary)
    return config.replace(num_kv_heads=config.num_heads // 2) if layout == "gqa" else config


def decode(config: ModelConfig, place: Slice) -> Document:
    """GB that a device moves for a token of each row, and the least that it can.

    Or bytes that are missing of its memory.
    """
    from pallas_kernels.tpu.topology import slice_devices

    rows = _ROWS * place.devices
    made = inference(
        "decode", config, slice_devices(place.name), tensor=1, rows=rows, length=_LENGTH
    )
    try:
        found = ahead.report.make_report(made, place)
    except ahead.report.DoesNotFit as error:
        return {"rows": rows, "length": _LENGTH, "missing": error.missing}
    least = found.parts["parameters"] + made.cache_reads
    figures = {
        "hbm_gb": found.hbm,
        "least_gb": least,
        "temporaries_gb": found.temporaries,
        # What one layer caches, keys and values: no temporary should be as large.
        "layer_gb": _ROWS * _LENGTH * 2 * config.kv_heads * config.channels * 2,
    }
    return {"rows": rows, "length": _LENGTH} | {k: round(v / 1e9, 4) for k, v in figures.items()}


def compute(results: list[Document], path: pathlib.Path) -> None:
    """Fill in what is missing."""
    import jax

    from pallas_kernels.tpu.topology import TOPOLOGIES

    wanted = [
        {"preset": preset, "layout": layout, "topology": TOPOLOGIES[chip], "vocabulary": number}
        for preset in FLAGS.presets
        for chip in FLAGS.chips
        for layout in FLAGS.layouts
        for number in [FLAGS.vocabulary]
    ]
    for cell in wanted:
        if any(cell.items() <= row.items() for row in results):
            continue
        config = model(cell["preset"], cell["layout"], cell["vocabulary"])
        row = cell | decode(config, Slice.parse(cell["topology"]))
        results.append(row)
        jax.clear_caches()
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(*cell.values(), _cell(row), flush=True)


def tables(results: Sequence[Row]) -> str:
    """Ratios by layout with the small vocabulary, then all that is known with the whole one."""
    from pallas_kernels.tpu.topology import TOPOLOGIES

    short = [row for row in results if row["vocabulary"] != _WHOLE]
    columns = ["size", "chip", *_LAYOUTS, "temporaries GB", "a layer's cache GB"]
    page = [columns, ["---"] * 2 + ["---:"] * (len(columns) - 2)]
    for preset in dict.fromkeys(row["preset"] for row in short):
        for chip, topology in TOPOLOGIES.items():
            found = {
                row["layout"]: row
                for row in short
                if (row["preset"], row["topology"]) == (preset, topology)
            }
            if found:
                fit = [row for row in found.values() if "missing" not in row]
                most = max((row["temporaries_gb"] for row in fit), default=0.0)
                layer = min((row["layer_gb"] for row in fit), default=0.0)
                ratios = [_cell(found[x]) if x in found else "" for x in _LAYOUTS]
                page.append([preset, chip, *ratios, f"{most:.3f}", f"{layer:.3f}"])
    text = _markdown(page)
    page = [["size", "layout", "slice", "HBM traffic GB"]]
    page[0] += ["parameters + cache reads GB", "ratio", "temporaries GB"]
    page.append(["---"] * 3 + ["---:"] * 4)
    for row in results:
        if row["vocabulary"] == _WHOLE:
            names = [row["preset"], row["layout"], row["topology"]]
            sizes = [f"{row[name]:.2f}" for name in ("hbm_gb", "least_gb")]
            last = [f"{_ratio(row):.2f}", f"{row['temporaries_gb']:.2f}"]
            page.append([*names, *sizes, *last])
    return text + "\n" + _markdown(page)


def _cell(row: Row) -> str:
    return "does not fit" if "missing" in row else f"{_ratio(row):.3f}"


def _ratio(row: Row) -> float:
    return row["hbm_gb"] / row["least_gb"]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def main() -> None:
    path, document = cli.check_output(FLAGS.results), cli.check_output(FLAGS.document)
    pages.check_marks(document, _MARKS)
    none: list[Document] = []
    results = pages.read_results(path, none)
    compute(results, path)
    pages.replace_part(document, _MARKS, tables(results))


if __name__ == "__main__":
    define_flags()
    cli.run(main, keep_programs=False)
