"""The store of training and of scoring whole sequences: it holds nothing."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fusedkv_jax.cache.calls import Call, Piece, Rows, View
from fusedkv_jax.cache.storage import Slot
from fusedkv_jax.cache.stores import Store
from fusedkv_jax.layouts import Kind


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclass(frozen=True)
class SequenceStore(Store):
    """Hands on the tokens of the call itself, of which a query sees those of its document."""

    transient: ClassVar[bool] = True

    def writes_at_end(self, call: Call) -> bool:
        return True

    def view(
        self, kind: Kind, slot: Slot, new: Float[Array, "B T K H"] | None, call: Call
    ) -> Float[Array, "B T K H"]:
        assert new is not None
        return new

    def shared(self, view: Float[Array, "B T K H"]) -> Float[Array, "B T K H"]:
        # Every layer that reads it adds to its gradient: in float32, or bfloat16 would round
        # the sum at each layer. The attention operation rounds back, which XLA cancels in the
        # forward pass, and returns float32 gradients.
        return view.astype(jnp.float32)

    def pieces(
        self,
        keys: tuple[View, ...],
        values: tuple[View, ...],
        q: Float[Array, "B t N H"],
        rows: Rows,
        call: Call,
    ) -> tuple[Piece, ...]:
        mask = rows.mask()
        if not rows.strict:
            del mask["q_positions"]  # the default, which is known while tracing
        if call.segment_ids is not None:
            mask |= {"q_segment_ids": call.segment_ids, "kv_segment_ids": call.segment_ids}
        return (Piece(keys, values, mask),)

    @property
    def capacity(self) -> int | None:
        return None
