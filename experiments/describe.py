"""Draw a layout in plain text, and say what it costs in a model of a given size.

python -m experiments.describe --layout=fusedkv --num_layers=12
python -m experiments.describe --layout=cla:k=3 --preset=qwen3_8b
python -m experiments.describe --list
"""

import inspect

from absl import flags

from experiments import cli
from fusedkv_jax import costs, layouts, presets
from fusedkv_jax.layouts import named

_LAYOUT = flags.DEFINE_string(
    "layout",
    "fusedkv",
    "A named layout, with options (cla:k=3), or one in the layer-types grammar.",
)
_NUM_LAYERS = flags.DEFINE_integer(
    "num_layers", None, "Number of layers; by default the preset's, or 12."
)
_PRESET = flags.DEFINE_string(
    "preset", None, f"Also print the costs of this model: {', '.join(presets.names())}."
)
_LENGTH = flags.DEFINE_integer("length", 8192, "Tokens in the prompt and in the cache.")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Storage type of the cache.")
_LIST = flags.DEFINE_bool("list", False, "List the named layouts and their options.")


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
    if _LIST.value:
        print(list_layouts())
        return
    layers = _NUM_LAYERS.value
    if _PRESET.value is None:
        print(layouts.draw(layouts.resolve(_LAYOUT.value, 12 if layers is None else layers)))
        return
    overrides = {} if layers is None else {"num_layers": layers}
    config = presets.get(_PRESET.value, layout=_LAYOUT.value, **overrides)
    print(layouts.draw(config.kv_layout))
    print(f"\n{_PRESET.value}, {_LENGTH.value:,} tokens, {_DTYPE.value} cache, one sequence")
    for name, value in costs.summary(config, _LENGTH.value, _DTYPE.value).items():
        decimals = 3 if name == "cache_ratio" else 0
        print(f"  {name:<22} {value:,.{decimals}f}")
    print("parameters")
    for part, count in costs.parameter_breakdown(config).items():
        print(f"  {part:<22} {count:,}")


if __name__ == "__main__":
    cli.run(main)
