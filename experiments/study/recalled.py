"""Where a loss comes from: targets that the context gives away, and others.

Targets are told apart as in Zoology (arXiv 2312.04927, section 3), by the pair of a target and
the token before it:

    recalled   the pair stands earlier in the context, and is rare in the training text: whoever
               looks it up knows the target, and hardly anybody else ("AR hit" there)
    repeated   the pair stands earlier in the context, and is not rare
    new        it does not stand there

A context is a packed sequence, within one document.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from fusedkv_jax import Decoder
from fusedkv_jax.data.packing import TokenizedDocuments
from fusedkv_jax.training.loss import Batch
from fusedkv_jax.training.step import BATCH_KEYS

GROUPS: tuple[str, ...] = ("recalled", "repeated", "new")
RARE = 1e-6  # at most so large a part of the training text's pairs is a rare one
_CHUNK = 2**22  # pairs that are counted at once


def common_pairs(documents: TokenizedDocuments) -> np.ndarray:
    """The pairs of neighbors that are more than `RARE` of all in some documents.

    Returns:
      Their numbers by `_pairs`, in ascending order; int64 [at most 1 / RARE].
    """
    known, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    waiting: list[np.ndarray] = []
    size = 0
    for index in range(len(documents.lengths)):
        ids = documents.read(index)
        waiting.append(_pairs(ids[:-1], ids[1:]))
        size += len(waiting[-1])
        if size >= _CHUNK:
            known, counts = _counted(known, counts, waiting)
            waiting, size = [], 0
    known, counts = _counted(known, counts, waiting)
    return known[counts > RARE * counts.sum()]


def _pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A number for each pair of tokens, the same for every vocabulary."""
    return first.astype(np.int64) << 32 | second.astype(np.int64)


def _counted(
    known: np.ndarray, counts: np.ndarray, more: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Counts of pairs together with one more of each of some others, sorted by pair."""
    found, found_counts = np.unique(np.concatenate([known[:0], *more]), return_counts=True)
    both, places = np.unique(np.concatenate([known, found]), return_inverse=True)
    totals = np.zeros(len(both), np.int64)
    np.add.at(totals, places, np.concatenate([counts, found_counts]))
    return both, totals


def masks(batch: Mapping[str, Any], common: np.ndarray) -> dict[str, np.ndarray]:
    """The targets of each group that count, as loss masks.

    Args:
      batch: [B, T] arrays of `fusedkv_jax.data`: tokens, targets, segment_ids and loss_mask.
      common: from `common_pairs`.
    """
    tokens, targets, segments = (batch[x] for x in ("tokens", "targets", "segment_ids"))
    counted = np.asarray(batch["loss_mask"]) != 0
    pairs = _pairs(tokens, targets)
    contexts = np.arange(len(tokens))[:, None] * (segments.max() + 1) + np.maximum(segments, 0)
    distinct, numbers = np.unique(pairs, return_inverse=True)
    numbers = contexts * len(distinct) + numbers.reshape(pairs.shape)
    _, first = np.unique(numbers, return_index=True)
    seen = np.ones(tokens.size, bool)
    seen[first] = False
    seen = seen.reshape(tokens.shape) & counted
    likely = np.isin(pairs, common)
    return {"recalled": seen & ~likely, "repeated": seen & likely, "new": counted & ~seen}


def losses(
    model: Decoder, batches: Iterable[Mapping[str, Any]], common: np.ndarray
) -> dict[str, dict[str, float]]:
    """Mean loss in nats and number of targets of each group that a text has.

    Args:
      model: on one device.
      batches: of the text, as `fusedkv_jax.data` gives them.
      common: from `common_pairs`.
    """
    graphdef, params = nnx.split(model)

    @jax.jit
    def token_losses(params: nnx.State, batch: Batch) -> jax.Array:
        inputs = (batch[name] for name in ("tokens", "segment_ids", "positions"))
        logits = nnx.merge(graphdef, params)(*inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])

    sums, counts = dict.fromkeys(GROUPS, 0.0), dict.fromkeys(GROUPS, 0)
    for batch in batches:
        found = np.asarray(token_losses(params, {name: batch[name] for name in BATCH_KEYS}))
        for name, mask in masks(batch, common).items():
            sums[name] += float(found[mask].sum(dtype=np.float64))
            counts[name] += int(mask.sum())
    return {
        name: {"targets": counts[name], "loss": sums[name] / counts[name]}
        for name in GROUPS
        if counts[name]
    }
