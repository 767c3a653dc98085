"""Our models in vLLM on TPU: a plugin of tpu-inference, found by vLLM as an entry point.

Its attention kernel reads one array of pages a layer. Fusing is linear, so it is folded into the
queries and the outputs (`folding`): the last layer below stores the records of all sources side by
side, and the layers above query them with weighted copies of their queries.
"""

from fusedkv_jax.interop.tpu_inference.folding import Fold, fold
from fusedkv_jax.interop.tpu_inference.plugin import register

__all__ = ["Fold", "fold", "register"]
