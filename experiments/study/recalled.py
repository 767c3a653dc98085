"""Where a loss comes from: targets that the context gives away, and others.

Targets are told apart as in Zoology (arXiv 2312.04927, section 3), by the pair of a target and
the token before it:

    recalled   the pair stands earlier in the context, and is rare in the training text: whoever
               looks it up knows the target, and hardly anybody else ("AR hit" there)
    repeated   the pair stands earlier in the context, and is not rare
    new        it does not stand there

A context is a packed sequence, within one document.
"""

from collections.abc import Iterable, Mapping
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
RARE = 1e-6  # of the training text's pairs; at most so many are this one
_CHUNK = 2**22  # pairs that are counted at once


def rare_pairs(documents: TokenizedDocuments, vocab_size: int) -> np.ndarray:
    """Which pairs of neighbors are at most `RARE` of all in some documents; bool [V, V].

    It counts all V * V pairs, 134 MB with the 4,096 tokens of our studies.
    """
    counts = np.zeros(vocab_size**2, np.int64)
    waiting, size = [], 0
    for index in range(len(documents.lengths)):
        ids = documents.read(index).astype(np.int64)
        waiting.append(ids[:-1] * vocab_size + ids[1:])
        size += len(ids) - 1
        if size >= _CHUNK:
            counts += np.bincount(np.concatenate(waiting), minlength=len(counts))
            waiting, size = [], 0
    if waiting:
        counts += np.bincount(np.concatenate(waiting), minlength=len(counts))
    return (counts <= RARE * counts.sum()).reshape(vocab_size, vocab_size)


def masks(batch: Mapping[str, Any], rare: np.ndarray) -> dict[str, np.ndarray]:
    """The targets of each group that count, as loss masks.

    Args:
      batch: [B, T] arrays of `fusedkv_jax.data`: tokens, targets, segment_ids and loss_mask.
      rare: from `rare_pairs`.
    """
    tokens, targets, segments = (batch[x] for x in ("tokens", "targets", "segment_ids"))
    counted = np.asarray(batch["loss_mask"]) != 0
    pairs = tokens.astype(np.int64) * len(rare) + targets
    contexts = np.arange(len(tokens))[:, None] * (segments.max() + 1) + np.maximum(segments, 0)
    _, first = np.unique(contexts * rare.size + pairs, return_index=True)
    seen = np.ones(tokens.size, bool)
    seen[first] = False
    seen = seen.reshape(tokens.shape) & counted
    unlikely = rare[tokens, targets]
    return {"recalled": seen & unlikely, "repeated": seen & ~unlikely, "new": counted & ~seen}


def losses(
    model: Decoder, batches: Iterable[Mapping[str, Any]], rare: np.ndarray
) -> dict[str, dict[str, float]]:
    """Mean loss in nats and number of targets of each group that a text has.

    Args:
      model: on one device.
      batches: of the text, as `fusedkv_jax.data` gives them.
      rare: from `rare_pairs`.
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
        for name, mask in masks(batch, rare).items():
            sums[name] += float(found[mask].sum(dtype=np.float64))
            counts[name] += int(mask.sum())
    return {
        name: {"targets": counts[name], "loss": sums[name] / counts[name]}
        for name in GROUPS
        if counts[name]
    }
