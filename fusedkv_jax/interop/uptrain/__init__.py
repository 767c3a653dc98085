"""Conversion of a pretrained decoder to a layout that caches less.

A layer that loses its keys and values reads those of others, which are other numbers. What its
layout's weights cannot express is absorbed into matrices that the model keeps, and the architecture
stays as it is:

- keys and values that are read by several layers are projected anew, to serve all their readers;
- query heads move to the KV head whose streams predict theirs best (an assignment problem), and a
  complex factor per rotary pair, which commutes with the rotation, goes into the queries;
- the map from the values that are read to those that were goes into the output projection;
- the matrices that read hidden states expect those of the original, and the two that write them are
  fitted to bring them back to it, layer after layer upwards, so that each corrects those below.

No gradient is needed: some thousand tokens, and two passes through the original.
"""

from fusedkv_jax.interop.uptrain.fitting import drop, fit, fitted_config

__all__ = ["drop", "fit", "fitted_config"]
