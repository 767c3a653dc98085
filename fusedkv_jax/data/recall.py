"""The source "recall": examples of all recall tasks, written when they are read."""

import numpy as np

from fusedkv_jax.data import recall_tasks
from fusedkv_jax.data.packing import empty_sequence
from fusedkv_jax.data.recall_forms import TokenForm

SHORTEST = 16
SHORTEST_TASK = 64  # shorter examples are drill
DRILL_SHARE = 0.5
REPEAT_SHARE = 0.5  # of the drill
_SPLITS = ("train", "heldout")
_LENGTHS = {"train": 2**30, "heldout": 2**12}


class RecallSequences:
    """Sequences of packed examples by index, in the form of `packing.PackedSequences`.

    Sequence i holds examples of one length, seq_len divided by a power of two. Half of them, and
    all short ones, are drill: facts that are asked again and again, or a few tokens repeated.
    Repeats of two tokens teach to look one token back, longer ones to look for a token's earlier
    place; from the tasks alone that takes many times as long. Only what can be known is a target:
    the rest is random, and predicting it would be learning noise.

    Args:
      split: "train", which never ends in practice, or "heldout".
      vocab_size: token ids to use.
      seq_len: tokens of a sequence.
      seed: another seed makes other training examples; the held-out ones are always the same.
    """

    def __init__(self, split: str, *, vocab_size: int, seq_len: int, seed: int) -> None:
        if seq_len < SHORTEST:
            raise ValueError(f"data seq_len={seq_len} is too short for recall; use {SHORTEST}")
        self._form = TokenForm(vocab_size)
        self._seq_len = seq_len
        self._key = (_SPLITS.index(split), seed if split == "train" else 0)
        self._length = _LENGTHS[split]
        self._halvings = (seq_len // SHORTEST).bit_length()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((*self._key, index))
        row = empty_sequence(self._seq_len)
        size = self._seq_len >> int(rng.integers(self._halvings))
        for segment, low in enumerate(range(0, self._seq_len - size + 1, size), 1):
            tokens, known = self._example(size, rng)
            here, pairs = slice(low, low + size), slice(low, low + size - 1)
            row["tokens"][here] = tokens
            row["targets"][pairs] = tokens[1:]
            row["loss_mask"][pairs] = known[1:]
            row["segment_ids"][here] = segment
            row["positions"][here] = np.arange(size)
        row["target_bytes"] = row["loss_mask"].astype(np.int32)
        return row

    def _example(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and which of them follow from those before."""
        names = recall_tasks.names()
        task = names[int(rng.integers(len(names)))]
        if size < SHORTEST_TASK or rng.random() < DRILL_SHARE:
            if rng.random() < REPEAT_SHARE:
                period = int(2 ** rng.uniform(0, np.log2(size // 2)))
                repeated = 1 + rng.integers(0, 2 * self._form.num_keys, period)
                return np.resize(repeated, size).astype(np.int32), np.arange(size) >= period
            task = recall_tasks.DRILL
        tokens, _, answers = recall_tasks.example(task, self._form, size, rng)
        return tokens, answers > 0
