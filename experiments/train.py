"""Train a model: python -m experiments.train --config=demo --workdir=DIR.

Run the same command again to go on after an interruption. Exit codes: 0 the run is complete,
2 a mistake in the command (one line says which), 75 SIGTERM or Ctrl-C: the state was saved.
"""

import json

from absl import flags

from experiments import cli
from fusedkv_jax.training import INTERRUPTED_EXIT_CODE, train

cli.define_config()
flags.DEFINE_string(
    "workdir", None, "Directory for checkpoints and metrics; a run found there is resumed."
)


def main() -> int:
    config = cli.load_config()
    result = train(config, cli.require("workdir"))
    summary = {"name": config.name, "step": result.step, "interrupted": result.interrupted}
    print(json.dumps(summary | result.metrics))
    return INTERRUPTED_EXIT_CODE if result.interrupted else 0


if __name__ == "__main__":
    cli.run(main)
