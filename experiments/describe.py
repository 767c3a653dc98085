"""Draw a layout in plain text, and say what it costs in a model of a given size.

python -m experiments.describe --layout=fusedkv --num_layers=12
python -m experiments.describe --layout=cla:k=3 --preset=qwen3_8b
python -m experiments.describe --list
"""

import inspect

from absl import flags

from experiments.common import cli
from fusedkv_jax import costs, layouts, presets
from fusedkv_jax.layouts import named

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_string(
        "layout",
        "fusedkv",
        "A named layout, with options (cla:k=3), or one in the layer-types grammar.",
    )
    flags.DEFINE_integer("num_layers", None, "Number of layers; by default the preset's, or 12.")
    flags.DEFINE_string(
        "preset", None, f"Also print the costs of this model: {', '.join(presets.names())}."
    )
    flags.DEFINE_integer("length", 8192, "Tokens in the prompt and in the cache.")
    flags.DEFINE_string("dtype", "bfloat16", "Storage type of the cache.")
    flags.DEFINE_bool("list", False, "List the named layouts and their options.")
    cli.only_with("layout num_layers preset", list=False)
    cli.only_with("length dtype", list=False, preset=True)


def list_layouts() -> str:
    """Every named layout with its first docstring line and its options."""
    lines = []
    for name in layouts.names():
        function = getattr(named, name)
        lines.append(f"{name}\n    {(inspect.getdoc(function) or name).splitlines()[0]}")
        options = list(inspect.signature(function).parameters.values())[1:]
        if options:
            text = ", ".join(f"{option.name}={option.default}" for option in options)
            lines.append(f"    options: {text}")
    return "\n".join(lines)


def main() -> None:
    if FLAGS.list:
        print(list_layouts())
        return
    layers = FLAGS.num_layers
    if FLAGS.preset is None:
        print(layouts.draw(layouts.resolve(FLAGS.layout, 12 if layers is None else layers)))
        return
    overrides = {} if layers is None else {"num_layers": layers}
    config = presets.get(FLAGS.preset, layout=FLAGS.layout, **overrides)
    figures = costs.summary(config, FLAGS.length, FLAGS.dtype)
    print(layouts.draw(config.kv_layout))
    print(f"\n{FLAGS.preset}, {FLAGS.length:,} tokens, {FLAGS.dtype} cache, one sequence")
    for name, value in figures.items():
        decimals = 3 if name == "cache_ratio" else 0
        print(f"  {name:<22} {value:,.{decimals}f}")
    print("parameters")
    for part, count in costs.parameter_breakdown(config).items():
        print(f"  {part:<22} {count:,}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
