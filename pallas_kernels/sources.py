"""What a call of attention reads: sources of the keys and of the values, and their weights."""

from collections.abc import Sequence
from typing import NamedTuple

from jax import Array
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.paged_stream import PagedStream
from pallas_kernels.quantized import Quantized
from pallas_kernels.stacked import Stacked

Source = Array | Quantized | Stacked | PagedStream  # [B, S, K, H]

# The output [B, T, N, H'], and the log of the softmax's denominator [B, T, N] in float32.
Result = tuple[Array, Array]

SAVED = ("attention_out", "attention_lse")  # names of both, for policies of rematerialization


class MixedSources(NamedTuple):
    """The sources of both sides; for `jax.tree` a tuple.

    Attributes:
      keys: J sources of the keys, of one shape [B, S, K, H].
      values: J' of the values, [B, S, K, H'].
      key_weights: [J, K, H], or None for one source.
      value_weights: [J', K, H'], or None for one source.
    """

    keys: Sequence[Source]
    values: Sequence[Source]
    key_weights: Array | None
    value_weights: Array | None


def as_array(source: Source) -> Array:
    """The source as an array [B, S, K, H]; stored numbers become float32."""
    if isinstance(source, Stacked | PagedStream):
        source = source.read()
    return source.dequantize() if isinstance(source, Quantized) else source


def named(out: Array, lse: Array) -> Result:
    """A forward pass's result under the names that `jax.checkpoint` policies can save it by.

    Without these a policy that saves matrix products saves nothing of a kernel, which is no product
    to it, and the backward pass would run the forward kernel again for its residuals.
    """
    return checkpoint_name(out, SAVED[0]), checkpoint_name(lse, SAVED[1])
