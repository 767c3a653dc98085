"""Print what each layout costs: parameters, cache, bytes read and FLOPs, for several sizes.

    python -m experiments.costs
    python -m experiments.costs --preset=qwen3_8b --layout=mha --layout=fusedkv --length=32768

Nothing is allocated or run. The last line is the same as one JSON document.
"""

import json

from absl import flags

from experiments.common import cli
from experiments.common.documents import Document
from fusedkv_jax import costs, layouts, presets

FLAGS = flags.FLAGS
_PAPER = ("332m", "650m", "1_5b", "4b")

_COLUMNS = (
    # heading, key of `costs.summary`, divisor, decimals
    ("params M", "parameters", 1e6, 1),
    ("removed M", "parameters_removed", 1e6, 1),
    ("KiB/token", "cache_bytes_per_token", 1024, 2),
    ("cache MiB", "cache_bytes", 2**20, 1),
    ("of MHA", "cache_ratio", 1, 3),
    ("read MiB", "decode_cache_reads", 2**20, 1),
    ("prefill TFLOP", "prefill_flops", 1e12, 2),
    ("decode GFLOP", "decode_flops", 1e9, 2),
    ("train GFLOP/token", "train_flops_per_token", 1e9, 2),
)


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_multi_string(
        "preset",
        list(_PAPER),
        f"Model size; may be repeated: {', '.join(presets.names())}.",
    )
    flags.DEFINE_multi_string(
        "layout",
        [],
        "Layout, with options (cla:k=3) or in the layer-types grammar; may be repeated. "
        "By default all named ones.",
    )
    flags.DEFINE_integer("length", 8192, "Tokens in the prompt and in the cache.")
    flags.DEFINE_string("dtype", "bfloat16", "Storage type of the cache.")
    flags.DEFINE_integer(
        "num_kv_heads", None, "Key/value heads (GQA, MQA) instead of the preset's."
    )


def table(rows: list[Document]) -> str:
    """Plain-text table of the rows of one preset; a refused layout shows the reason."""
    name_width = max(len(row["layout"]) for row in rows)
    lines = ["  ".join(["layout".ljust(name_width), *(column[0] for column in _COLUMNS)])]
    for row in rows:
        cells = [row["layout"].ljust(name_width)]
        if "refused" in row:
            cells.append(f"refused: {row['refused']}")
        else:
            cells += [
                # Adding 0.0 turns a rounded -0.0 into 0.0.
                f"{round(row[key] / unit, decimals) + 0.0:{len(heading)},.{decimals}f}"
                for heading, key, unit, decimals in _COLUMNS
            ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _rows(preset: str, length: int, dtype: str) -> list[Document]:
    heads = FLAGS.num_kv_heads
    overrides = {} if heads is None else {"num_kv_heads": heads}
    presets.get(preset, layout="mha", **overrides)  # what is wrong here is wrong in every row
    rows = []
    for layout in FLAGS.layout or layouts.names():
        row = {"preset": preset, "layout": layout}
        try:
            config = presets.get(preset, layout=layout, **overrides)
        except ValueError as error:
            if FLAGS.layout:
                raise
            rows.append(row | {"refused": str(error)})  # does not fit this depth or MLA
            continue
        rows.append(row | costs.summary(config, length, dtype))
    return rows


def _size(preset: str) -> str:
    """What the parameters are, and what is not counted in the names of the paper's sizes."""
    parts = costs.parameter_breakdown(presets.get(preset, layout="mha"))
    embedding, head = parts["embedding"], parts["head"]
    layers = sum(parts.values()) - embedding - head
    text = (
        f"as mha: {layers / 1e6:,.1f}M parameters in the layers, {embedding / 1e6:,.1f}M in the "
        f"embedding, {head / 1e6:,.1f}M in the output head"
    )
    return f"{text}; the paper's name leaves the head out" if preset in _PAPER else text


def main() -> None:
    length, dtype = FLAGS.length, FLAGS.dtype
    everything = []
    for preset in FLAGS.preset:
        rows = _rows(preset, length, dtype)
        print(f"{preset}, {length:,} tokens, {dtype} cache, one sequence\n{table(rows)}")
        print(f"{_size(preset)}\n")
        everything += rows
    print(json.dumps({"length": length, "dtype": dtype, "rows": everything}))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
