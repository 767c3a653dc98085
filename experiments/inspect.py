"""Show what is in a checkpoint, and verify every file of it.

python -m experiments.inspect --workdir=DIR            (all steps)
python -m experiments.inspect --workdir=DIR --step=400

Exit code 1 if a file is damaged; the line that says so names it.
"""

import collections
import pathlib
import time

from absl import flags

from experiments.common import cli
from fusedkv_jax import costs, training

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_string("workdir", None, "Directory of a training run, or of one checkpoint.")
    flags.DEFINE_integer("step", None, "Only this step; by default all.")
    flags.DEFINE_bool("show_config", False, "Print the whole configuration, too.")


def describe(path: pathlib.Path) -> str:
    """What the manifest of one checkpoint says, as lines of text.

    Raises:
      CheckpointError: the manifest is missing or damaged.
    """
    from fusedkv_jax.training.checkpointing import manifest

    found = manifest.read(path)
    config = training.ExperimentConfig.from_dict(found.config)
    model = config.model
    sizes: collections.Counter[str] = collections.Counter()
    for name, (size, _) in found.files.items():
        sizes[name.split("/")[0] if "/" in name else "metadata"] += size
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
    rows = {
        "run": f"{config.name}, step {found.step} of {config.train.steps}, saved {saved}",
        "model": f"{model.to_dict()['layout']}, {model.num_layers} layers, width {model.d_model}, "
        f"{costs.parameter_count(model):,} parameters",
        "files": ", ".join(f"{item} {size / 1e6:.2f} MB" for item, size in sorted(sizes.items())),
        "metrics": ", ".join(f"{k} {_number(v)}" for k, v in found.metrics.items()) or "none",
        "versions": ", ".join(f"{k} {v}" for k, v in found.versions.items()),
    }
    lines = [str(path), *(f"  {name:<10}{text}" for name, text in rows.items())]
    if FLAGS.show_config:
        lines += [f"  {name:<10}{value}" for name, value in found.config.items()]
    return "\n".join(lines)


def main() -> int:
    from fusedkv_jax.training.checkpointing import manifest

    target = cli.require("workdir")
    path = pathlib.Path(target).expanduser()
    if path.exists() and not path.is_dir():
        raise ValueError(f"--workdir={target} is not a directory; name one of a training run")
    if not path.is_dir():
        raise FileNotFoundError(2, "No such directory", target)
    if (path / manifest.FILE).exists():
        paths = [path]
    else:
        directory = next(
            d
            for d in (training.checkpoint_directory(path), path)
            if training.committed_steps(d) or d == path
        )
        steps = training.committed_steps(directory)
        if not steps:
            runs = [
                str(d.parent)
                for d in sorted(path.glob("*/checkpoints"))
                if training.committed_steps(d)
            ]
            hint = f"; there are runs in {', '.join(runs)}" if runs else ""
            raise training.CheckpointError(f"there is no checkpoint in {target}{hint}")
        if FLAGS.step is not None and FLAGS.step not in steps:
            known = ", ".join(map(str, steps))
            raise training.CheckpointError(
                f"--step={FLAGS.step} is not in {target}, which has {known}"
            )
        chosen = steps if FLAGS.step is None else [FLAGS.step]
        paths = [directory / str(step) for step in chosen]
    return max([_show(path) for path in paths])


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _show(path: pathlib.Path) -> int:
    """Print one checkpoint; 1 if it is damaged."""
    from fusedkv_jax.training.checkpointing import manifest

    try:
        print(describe(path))
        start = time.perf_counter()
        found = manifest.verify(path)
        seconds = time.perf_counter() - start
    except training.DamagedCheckpointError as damage:
        print(f"  DAMAGED   {damage}")
        return 1
    rate = found.nbytes / seconds / 1e9
    print(f"  verified  {len(found.files)} files, {found.nbytes / 1e6:.2f} MB, {rate:.2f} GB/s")
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main)
