"""Compile the paper's sizes for a list of TPU slices: the table in docs/guides/tpu_slices.md.

    python -m experiments.tpu_slices --presets=332m --slices=v6e:16x16

Computes the rows that flags select, all training steps of the table by default, and leaves the
others as they are. --programs=prefill,decode adds a second table. Results go to
experiments/results/tpu_slices.json as they come, and those that are there already are not computed
again, unless they lack a peak: delete the file to begin anew. Needs libtpu and no TPU; a program
takes some minutes of two CPU cores.
"""

import json
import pathlib

from absl import flags

from experiments.common import cli, pages
from experiments.common.documents import Document
from experiments.common.paper import inference, paper_run
from fusedkv_jax import compile_ahead as ahead
from fusedkv_jax.compile_ahead.chips import Slice

_ROOT = pathlib.Path(__file__).parents[1]
_MARKS = ("<!-- table -->\n", "<!-- end of table -->\n")
_PROGRAMS = ("train", "prefill", "decode")
_TENSOR, _LENGTH = 4, 8192  # of prefill and decoding

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_list("presets", ["4b", "332m", "1_5b", "650m"], "Sizes.")
    flags.DEFINE_list("layouts", ["fusedkv", "mha"], "Layouts.")
    flags.DEFINE_list("programs", ["train"], f"Programs: {', '.join(_PROGRAMS)}.")
    flags.DEFINE_list("slices", ["v5p:8x8x8", "v5e:16x16", "v6e:16x16", "tpu7x:4x4x8"], "Slices.")
    flags.DEFINE_string(
        "results", str(_ROOT / "experiments/results/tpu_slices.json"), "Where results are kept."
    )
    flags.DEFINE_string(
        "document", str(_ROOT / "docs/guides/tpu_slices.md"), "The page whose table is replaced."
    )


def train(preset: str, layout: str, place: Slice) -> Document:
    """The first settings of the search that fit, and their report."""
    from pallas_kernels.tpu.topology import slice_devices

    config = paper_run(preset, layout)
    trials = ahead.search.search(config, place, slice_devices(place.name), wanted=1)
    best = trials[0]
    row: Document = {"settings": str(best.candidate), "compiled": len(trials)}
    if best.report is None:
        return row | {"missing": best.missing}
    return row | best.report.to_dict()


def serve(preset: str, layout: str, place: Slice, program: str) -> Document:
    """Prefill or decoding on one host, a row for each device."""
    from pallas_kernels.tpu.topology import TOPOLOGIES, slice_devices

    host = Slice.parse(TOPOLOGIES[place.chip.name])
    sizes = {"tensor": _TENSOR, "rows": None, "length": _LENGTH}
    model = paper_run(preset, layout).model
    try:
        made = inference(program, model, slice_devices(host.name), **sizes)
        return ahead.report.make_report(made, host).to_dict()
    except ahead.report.DoesNotFit as error:
        return {"missing": error.missing}


def compute(results: Document, path: pathlib.Path) -> None:
    """Fill in what is missing of the selected rows."""
    import jax

    wanted = [
        (program, preset, layout, name)
        for program in FLAGS.programs
        for preset in FLAGS.presets
        for name in FLAGS.slices
        for layout in FLAGS.layouts
    ]
    for program, preset, layout, name in wanted:
        key = f"{program} {preset} {layout} {name}"
        if results.get(key, {}).keys() & {"peak", "missing"}:
            continue
        place = Slice.parse(name)
        if program == "train":
            results[key] = train(preset, layout, place)
        else:
            results[key] = serve(preset, layout, place, program)
        jax.clear_caches()
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(key, "does not fit" if "missing" in results[key] else "fits", flush=True)


def tables(results: Document) -> str:
    """Training, then prefill and decoding."""
    from pallas_kernels.tpu.topology import TOPOLOGIES

    train_rows, serve_rows = [], []
    for key, row in results.items():
        program, preset, layout, name = key.split()
        place = Slice.parse(name)
        if program == "train":
            train_rows.append([preset, layout, name, row["settings"], *_figures(row, place)])
        else:
            host = TOPOLOGIES[place.chip.name]
            serve_rows.append([preset, layout, host, program, *_figures(row, place)])
    figures = ["peak / usable GiB", "estimated time", "estimated MFU", "bound by"]
    columns = ["size", "layout", "slice"]
    page = _markdown([*columns, "mesh, remat, accumulation", *figures], sorted(train_rows))
    if serve_rows:
        page += "\n" + _markdown([*columns, "program", *figures], sorted(serve_rows))
    return page


def _figures(row: Document, place: Slice) -> list[str]:
    if "missing" in row:
        return [f"does not fit: {ahead.report.gib(row['missing'])} missing", "", "", ""]
    estimate = row["estimate"]
    peak = f"{row['peak'] / 2**30:.1f}" if "peak" in row else "not known yet"
    return [
        f"{peak} / {place.chip.hbm / 2**30:.1f}",
        ahead.text.milliseconds(estimate["seconds"]),
        f"{estimate['utilization']:.0%}",
        estimate["bound"],
    ]


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    if unknown := set(FLAGS.programs) - set(_PROGRAMS):
        known = ", ".join(_PROGRAMS)
        raise ValueError(f"--programs={unknown.pop()} is unknown; choose {known}")
    path, document = cli.check_output(FLAGS.results), cli.check_output(FLAGS.document)
    pages.check_marks(document, _MARKS)
    none: Document = {}
    results = pages.read_results(path, none)
    compute(results, path)
    pages.replace_part(document, _MARKS, tables(results))


if __name__ == "__main__":
    define_flags()
    cli.run(main, keep_programs=False)
