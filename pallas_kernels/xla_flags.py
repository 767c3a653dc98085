"""Keeps XLA from fusing sums on CPUs in the jaxlib releases that get such sums wrong."""

import os
from collections.abc import MutableMapping
from importlib import metadata

FLAG = "xla_cpu_experimental_ynn_fusion_type"
# 0.10.2 hands sums, with what feeds them, to YNNPACK. Sums over an inner axis of arrays of rank
# 6 and more, and over a short axis beside tens of thousands of rows, came out wrong without a
# word or ended in a segmentation fault: https://github.com/jax-ml/jax/issues/39103 and
# /40412. 0.11.0 still crashes: /39257. 0.10.1, 0.11.1 and 0.11.2 do neither in the same tries.
AFFECTED = ("0.10.2", "0.11.0")


def avoid_wrong_sums(environment: MutableMapping[str, str], version: str) -> bool:
    """Adds the flag that keeps these sums in XLA's own code, unless the user has set it.

    XLA reads the variable once, at the first computation of the process.

    Returns:
      Whether the flag was added.
    """
    flags = environment.get("XLA_FLAGS", "")
    if version not in AFFECTED or FLAG in flags:
        return False
    environment["XLA_FLAGS"] = f"{flags} --{FLAG}=-reduce".strip()
    return True


avoid_wrong_sums(os.environ, metadata.version("jaxlib"))
