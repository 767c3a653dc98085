"""Train a model: python -m experiments.train --config=demo --workdir=DIR.

Run the same command again to go on after an interruption. Exit codes: 0 the run is complete,
2 a mistake in the command (one line says which), 75 SIGTERM or Ctrl-C: the state was saved.
"""

import json

from absl import flags

from experiments import cli
from fusedkv_jax.training import INTERRUPTED_EXIT_CODE, train


def define_flags() -> None:
    """Define the flags."""
    cli.define_config()
    flags.DEFINE_string(
        "workdir", None, "Directory for checkpoints and metrics; a run found there is resumed."
    )
    flags.DEFINE_string(
        "profile_steps",
        None,
        "FIRST:LAST: write a profiler trace of these steps to WORKDIR/profile.",
    )


def main() -> int:
    config = cli.load_config()
    profile_steps = _steps(flags.FLAGS.profile_steps)
    result = train(config, cli.require("workdir"), profile_steps=profile_steps)
    summary = {"name": config.name, "step": result.step, "interrupted": result.interrupted}
    print(json.dumps(summary | result.metrics))
    return INTERRUPTED_EXIT_CODE if result.interrupted else 0


def _steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise ValueError(f"--profile_steps={text} must be FIRST:LAST, such as 20:24")
    return int(first), int(last)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
